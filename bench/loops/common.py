"""What the three loops share: flags, environments, stopwatch, compiling and graphs, evaluation."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, set_interaction_type
from torch import Tensor, nn

from bench.envs import CartPole, Pendulum
from bench.implementations import Implementation, implementation

NO_GRAPHS = (
    "--cudagraphs: a CUDA graph is a recording of what was launched on an NVIDIA GPU, so there is"
    " none on {device}; eager and compiled (--compile) loops run on a CPU"
)


@dataclass(frozen=True)
class Flags:
    """How a loop is run; the settings of the algorithm stand in each loop's own file.

    Attributes:
        impl: ``"upstream"`` or ``"fastprob"``: whose probabilistic modules the actor is made of.
        compile: whether policy and loss are compiled.
        cudagraphs: whether policy and update are captured as CUDA graphs.
        seed: of torch and of the environments.
        device: of everything.

    Raises:
        ValueError: for CUDA graphs on a device that has none.
    """

    impl: str = "fastprob"
    compile: bool = False
    cudagraphs: bool = False
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.cudagraphs and not self.device.startswith("cuda"):
            raise ValueError(NO_GRAPHS.format(device=self.device))

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Adds the five flags."""
        parser.add_argument("--impl", choices=("upstream", "fastprob"), default="fastprob")
        parser.add_argument("--compile", action="store_true", help="compile policy and loss")
        parser.add_argument("--cudagraphs", action="store_true", help="capture policy and update")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--device", default="cpu", help="such as cpu or cuda (default: cpu)")

    @classmethod
    def of(cls, args: argparse.Namespace) -> Flags:
        """Reads the flags back; ends the program where they do not go together."""
        try:
            return cls(args.impl, args.compile, args.cudagraphs, args.seed, args.device)
        except ValueError as error:
            raise SystemExit(str(error)) from None

    @property
    def form(self) -> str:
        """In words: eager, compiled, CUDA graphs."""
        words = ["compiled"] * self.compile + ["CUDA graphs"] * self.cudagraphs
        return ", ".join(words) or "eager"

    @property
    def side(self) -> Implementation:
        """The classes that the actor is made of."""
        return implementation(self.impl)


class Stopwatch:
    """Seconds at the clock and of CPU time, by part, from the time that it is started."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.running = False
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.count: dict[str, int] = {}

    @contextmanager
    def __call__(self, part: str, count: int) -> Iterator[None]:
        """Times a part, in which ``count`` steps are made."""
        if not self.running:
            yield
            return
        self._wait()
        begin, cpu = time.perf_counter(), time.process_time()
        yield
        self._wait()
        for held, value in (
            (self.seconds, time.perf_counter() - begin),
            (self.cpu_seconds, time.process_time() - cpu),
            (self.count, count),
        ):
            held[part] = held.get(part, 0) + value

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


@dataclass
class Run:
    """What one run of a loop reports.

    Attributes:
        loop: the loop and its variant, such as ``"ppo_continuous TanhNormal"``.
        env: the environment's name.
        flags: how it was run.
        frames: environment steps in all.
        steps: the environment steps after which each mean return was taken.
        returns: the mean return of the episodes that ended since, under the drawn actions.
        evaluation: the return of each of the episodes played at the end, in gymnasium's own
            environment, with deterministic actions.
        steps_per_second: of the parts, at the clock; environment steps, or updates.
        cpu_steps_per_second: the same per second of CPU time, which no other process disturbs.
        total_seconds: of all, with compiling and evaluation.
    """

    loop: str
    env: str
    flags: Flags
    frames: int = 0
    steps: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    evaluation: list[float] = field(default_factory=list)
    steps_per_second: dict[str, float] = field(default_factory=dict)
    cpu_steps_per_second: dict[str, float] = field(default_factory=dict)
    total_seconds: float = 0.0

    @property
    def final(self) -> float:
        """The mean return of the evaluation; of the last training returns where there is none."""
        return statistics.mean(self.evaluation or self.returns[-3:])

    def finish(self, watch: Stopwatch, begin: float) -> Run:
        """Takes over what the stopwatch has counted."""
        for part, count in watch.count.items():
            self.steps_per_second[part] = count / watch.seconds[part]
            self.cpu_steps_per_second[part] = count / max(watch.cpu_seconds[part], 1e-9)
        self.total_seconds = time.perf_counter() - begin
        return self

    def as_dict(self) -> dict[str, Any]:
        """Returns the run for JSON."""

        def short(value: Any) -> Any:
            if isinstance(value, float):
                return round(value, 2)
            if isinstance(value, list):
                return [short(item) for item in value]
            return {k: short(v) for k, v in value.items()} if isinstance(value, dict) else value

        return {**short(asdict(self)), "final_return": round(self.final, 1)}

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {rate:,.0f}/s" for part, rate in self.steps_per_second.items())
        return (
            f"{self.loop} on {self.env}, {self.flags.impl}, seed {self.flags.seed}:"
            f" return {self.final:.1f} after {self.frames:,} steps; {parts};"
            f" {self.total_seconds:.0f} s in all"
        )


def run_alone(steps: Iterator[Run]) -> Run:
    """Runs a loop to its end, and prints the return of each iteration."""
    run = None
    for run in steps:
        if run.returns and not run.evaluation:
            print(f"{run.frames:>9,} steps: return {run.returns[-1]:.0f}", flush=True)
    assert run is not None
    print(run)
    return run


# ----------------------------------------------------------------------------------- environments


class Environment(Protocol):
    """A batch of environments, each of which begins anew when its episode ends.

    Attributes:
        observation: what the policy sees next, ``[envs, features]``.
        low: smallest action, ``[action]``; None where actions are indices.
        high: largest action.
        actions: how many actions there are, or how many numbers an action has.
    """

    observation: Tensor
    low: Tensor | None
    high: Tensor | None
    actions: int

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the observation before a reset, reward, terminated and truncated."""
        ...


class Gymnasium:
    """gymnasium's own vectorised environments, with tensors going in and out.

    Args:
        name: as registered, such as ``"Pendulum-v1"``.
        count: how many environments.
        seed: of their resets.
        device: where the tensors live.

    Raises:
        ModuleNotFoundError: for an environment of MuJoCo where mujoco is not installed.
    """

    def __init__(self, name: str, count: int, seed: int = 0, device: str = "cpu") -> None:
        import gymnasium

        same_step = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
        try:
            self.env = gymnasium.make_vec(
                name, num_envs=count, vectorization_mode="sync", vector_kwargs=same_step
            )
        except gymnasium.error.DependencyNotInstalled as error:
            raise ModuleNotFoundError(
                f"{name} needs mujoco, which is not installed: pip install 'gymnasium[mujoco]'"
            ) from error
        self.device = device
        space = self.env.single_action_space
        self.discrete = hasattr(space, "n")
        self.actions = int(space.n) if self.discrete else space.shape[0]
        self.low = None if self.discrete else self._tensor(space.low)
        self.high = None if self.discrete else self._tensor(space.high)
        self.observation = self._tensor(self.env.reset(seed=seed)[0])

    def _tensor(self, array: Any) -> Tensor:
        # A copy: the environment may write into its arrays at the next step.
        return torch.tensor(array, dtype=torch.float32, device=self.device)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the observation before a reset, reward, terminated and truncated."""
        observation, reward, terminated, truncated, info = self.env.step(action.cpu().numpy())
        self.observation = self._tensor(observation)
        last = self.observation
        if "final_obs" in info:
            last = last.clone()
            for i in info["_final_obs"].nonzero()[0]:
                last[i] = self._tensor(info["final_obs"][i])
        flags = (torch.tensor(flag, device=self.device) for flag in (terminated, truncated))
        return last, self._tensor(reward), *flags

    def close(self) -> None:
        """Closes the environments."""
        self.env.close()


class Tensors:
    """The environments of ``bench.envs``, which live on the device.

    Args:
        name: ``"Pendulum-v1"`` or ``"CartPole-v1"``.
        count: how many environments.
        seed: of their resets.
        device: where the tensors live.
    """

    def __init__(self, name: str, count: int, seed: int = 0, device: str = "cpu") -> None:
        # A stream of their own: both sides of a comparison meet the same episodes.
        generator = torch.Generator(device).manual_seed(seed)
        self.env = TENSORS[name](device=device, generator=generator)
        limit = getattr(self.env, "max_torque", None)
        self.high = None if limit is None else torch.full((1,), limit, device=device)
        self.low = None if self.high is None else -self.high
        self.actions = 1 if limit is not None else 2
        self.root: TensorDictBase = self.env.reset([count])

    @property
    def observation(self) -> Tensor:
        """What the policy sees next, ``[envs, features]``."""
        return self.root["observation"]

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the observation before a reset, reward, terminated and truncated."""
        # Of indices, bench.envs asks for a last dimension.
        self.root["action"] = action if action.ndim == 2 else action.unsqueeze(-1)
        data, self.root = self.env.step(self.root)
        after = data["next"]
        flat = (after[key].squeeze(-1) for key in ("reward", "terminated", "truncated"))
        return after["observation"], *flat


TENSORS = {"Pendulum-v1": Pendulum, "CartPole-v1": CartPole}


def make_env(name: str, count: int, seed: int, device: str) -> Environment:
    """Returns a batch of environments that reset themselves, in tensors where there are such."""
    return (Tensors if name in TENSORS else Gymnasium)(name, count, seed, device)


@torch.no_grad()
def evaluate(
    policy: Callable[[TensorDict], TensorDict],
    name: str,
    *,
    seed: int,
    device: str,
    episodes: int = 20,
    inputs: Callable[[Tensor], dict[str, Tensor]] | None = None,
    act: Callable[[Tensor], Tensor] | None = None,
) -> list[float]:
    """Plays episodes in gymnasium's own environment, with deterministic actions.

    Where gymnasium is not installed, in the same environment in tensors.

    Args:
        policy: writes ``"action"``.
        name: of the environment.
        seed: of its resets.
        device: of the policy.
        episodes: how many, side by side.
        inputs: what the policy reads besides the observation.
        act: from the policy's action to the environment's.

    Returns:
        the return of each environment's first episode.
    """
    installed = importlib.util.find_spec("gymnasium") is not None
    env = (Gymnasium if installed else Tensors)(name, episodes, seed, device)
    total = torch.zeros(episodes, device=device)
    running = torch.ones(episodes, dtype=torch.bool, device=device)
    with set_interaction_type(InteractionType.DETERMINISTIC):
        while bool(running.any()):
            more = {} if inputs is None else inputs(env.observation)
            data = TensorDict({"observation": env.observation, **more}, batch_size=[episodes])
            action = policy(data)["action"]
            _, reward, terminated, truncated = env.step(action if act is None else act(action))
            total += reward * running
            running &= ~(terminated | truncated)
    if isinstance(env, Gymnasium):
        env.close()
    return total.tolist()


class Returns:
    """Adds up rewards, and takes the mean over the episodes that have ended."""

    def __init__(self, count: int, device: str) -> None:
        self.running = torch.zeros(count, device=device)
        self.sums: list[Tensor] = []

    def add(self, reward: Tensor, done: Tensor) -> None:
        """Counts one step of each environment; nothing is brought to the host."""
        self.running += reward
        self.sums.append(torch.stack([(self.running * done).sum(), done.sum().float()]))
        self.running *= ~done

    def take(self) -> float | None:
        """The mean return since the last call; None where no episode has ended."""
        total, count = torch.stack(self.sums).sum(0).tolist()
        self.sums.clear()
        return total / count if count else None


# ---------------------------------------------------------------------------- compiling and graphs


def faster_policy(policy: nn.Module, flags: Flags) -> Callable[[TensorDict], TensorDict]:
    """The policy that collects: as it is, compiled, captured, or both."""
    made: Any = torch.compile(policy) if flags.compile else policy
    if flags.cudagraphs:
        # torch's checks of arguments wait for the device, which no capture can.
        torch.distributions.Distribution.set_default_validate_args(False)
        if flags.impl == "fastprob":
            import fastprob

            return fastprob.CudaGraphPolicy(made)  # type: ignore[attr-defined]
        from tensordict.nn import CudaGraphModule

        # In and out keys are those of the module that the compiled one wraps.
        return CudaGraphModule(made, warmup=10, in_keys=policy.in_keys, out_keys=policy.out_keys)
    return made


def faster_update(
    update: Callable[[TensorDict], TensorDict], flags: Flags
) -> Callable[[TensorDict], TensorDict]:
    """The update, captured as one graph where that is asked for; the same way on both sides."""
    if flags.cudagraphs:
        from tensordict.nn import CudaGraphModule

        return CudaGraphModule(update, warmup=10, in_keys=[], out_keys=[])
    return update


def mlp(inputs: int, outputs: int, width: int = 64, last_gain: float = 1.0) -> nn.Sequential:
    """Two hidden layers of tanh, orthogonal weights; the usual network of PPO."""
    layers = [nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    layers.append(nn.Linear(width, outputs))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, 2**0.5)
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layers[-1].weight.mul_(last_gain)
    return nn.Sequential(*layers)
