"""PPO with continuous actions: Pendulum-v1, or HalfCheetah-v5 where mujoco is installed.

The clipped surrogate of Schulman et al., 2017 (arXiv:1707.06347), with TorchRL's ClipPPOLoss and
generalised advantages (arXiv:1506.02438). The actor's head is an IndependentNormal or a TanhNormal
of upstream or of fastprob; all else is the same.

    python -m bench.loops.ppo_continuous --impl fastprob --distribution TanhNormal

On a CPU it reaches a return of -250 on Pendulum-v1 within two minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    TensorDictModule,
    set_interaction_type,
)
from torch import nn
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value.functional import generalized_advantage_estimate

from bench.loops import common
from bench.loops.common import Flags, Returns, Run, Stopwatch

DISTRIBUTIONS = ("IndependentNormal", "TanhNormal")


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters for Pendulum-v1."""

    env: str = "Pendulum-v1"
    distribution: str = "IndependentNormal"
    envs: int = 32
    steps: int = 200
    iterations: int = 16
    epochs: int = 8
    minibatch: int = 800
    learning_rate: float = 4e-3
    gamma: float = 0.95
    lmbda: float = 0.95
    clip: float = 0.2
    entropy: float = 1e-3
    max_grad_norm: float = 0.5
    # Rewards reach -16 a step; a tenth of them keeps the value loss near 1.
    reward_scale: float = 0.1
    # Iterations that fill caches, compile and capture, and are not timed.
    burn_in: int = 2
    episodes: int = 50


CHEETAH = Settings(
    env="HalfCheetah-v5",
    envs=8,
    steps=256,
    iterations=240,
    epochs=10,
    minibatch=64,
    learning_rate=3e-4,
    gamma=0.99,
    entropy=0.0,
    reward_scale=1.0,
    episodes=10,
)


def make_actor(settings: Settings, flags: Flags, env: common.Environment) -> nn.Module:
    """An MLP, and the probabilistic module under comparison."""
    impl = flags.side
    assert env.low is not None and env.high is not None
    bounds = {"low": env.low, "high": env.high} if settings.distribution == "TanhNormal" else {}
    features = env.observation.shape[-1]
    net = nn.Sequential(
        common.mlp(features, 2 * env.actions, last_gain=0.01), NormalParamExtractor()
    )
    head = impl.SafeProbabilisticModule(
        in_keys=["loc", "scale"],
        out_keys=["action"],
        # Without bounds, the environment clips: the log-probability is that of the drawn action.
        spec=impl.specs.Unbounded(shape=(env.actions,), device=flags.device),
        distribution_class=getattr(impl, settings.distribution),
        distribution_kwargs=bounds,
        return_log_prob=True,
        # An explicit key: the two sides differ in the default.
        log_prob_key="action_log_prob",
        default_interaction_type=InteractionType.RANDOM,
    )
    params = TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"])
    return impl.SafeProbabilisticTensorDictSequential(params, head).to(flags.device)


@torch.no_grad()
def collect(
    env: common.Environment,
    policy: Callable[[TensorDict], TensorDict],
    settings: Settings,
    returns: Returns,
) -> TensorDict:  # [envs, steps]
    """Steps all environments, and keeps what the update needs."""
    kept = []
    with set_interaction_type(InteractionType.RANDOM):
        for _ in range(settings.steps):
            observation = env.observation
            data = policy(TensorDict({"observation": observation}, batch_size=[settings.envs]))
            action = data["action"]
            following, reward, terminated, truncated = env.step(action)
            done = terminated | truncated
            returns.add(reward, done)
            kept.append(
                TensorDict(
                    {
                        "observation": observation,
                        "action": action,
                        "action_log_prob": data["action_log_prob"],
                        "following": following,
                        "reward": (reward * settings.reward_scale).unsqueeze(-1),
                        "done": done.unsqueeze(-1),
                        "terminated": terminated.unsqueeze(-1),
                    },
                    batch_size=[settings.envs],
                )
            )
    return torch.stack(kept, 1)


@torch.no_grad()
def add_advantage(data: TensorDict, critic: nn.Module, settings: Settings) -> TensorDict:
    """Adds ``advantage``, standardised, and ``value_target``."""
    advantage, target = generalized_advantage_estimate(
        settings.gamma,
        settings.lmbda,
        critic(data["observation"]),
        critic(data["following"]),
        data["reward"],
        data["done"],
        data["terminated"],
    )
    data["advantage"] = (advantage - advantage.mean()) / advantage.std().clamp(min=1e-6)
    data["value_target"] = target
    return data


def train(settings: Settings, flags: Flags) -> Iterator[Run]:
    """Trains one policy, an iteration for each item that is taken, and evaluates it at the last.

    Args:
        settings: the hyper-parameters.
        flags: how it is run.

    Yields:
        the run as it stands.
    """
    begin = time.perf_counter()
    torch.manual_seed(flags.seed)
    env = common.make_env(settings.env, settings.envs, flags.seed, flags.device)
    actor = make_actor(settings, flags, env)
    critic = common.mlp(env.observation.shape[-1], 1).to(flags.device)
    loss = ClipPPOLoss(
        actor,
        TensorDictModule(critic, in_keys=["observation"], out_keys=["state_value"]),
        clip_epsilon=settings.clip,
        entropy_coeff=settings.entropy,
        critic_coeff=0.5,
        # The networks themselves are called, in place of copies with swapped parameters.
        functional=False,
    )
    loss.set_keys(sample_log_prob="action_log_prob")
    losses_of = torch.compile(loss) if flags.compile else loss
    rate = torch.tensor(settings.learning_rate, device=flags.device)
    optimizer = torch.optim.Adam(
        loss.parameters(), lr=rate, fused=True, capturable=flags.device.startswith("cuda")
    )

    def update(minibatch: TensorDict) -> TensorDict:
        losses = losses_of(minibatch)
        total = losses["loss_objective"] + losses["loss_entropy"] + losses["loss_critic"]
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(loss.parameters(), settings.max_grad_norm)
        optimizer.step()
        return TensorDict({"loss": total.detach()})

    run_update = common.faster_update(update, flags)
    policy = common.faster_policy(actor, flags)
    watch, returns = Stopwatch(flags.device), Returns(settings.envs, flags.device)
    run = Run(f"ppo_continuous {settings.distribution}", settings.env, flags)
    frames = settings.envs * settings.steps
    whole = frames // settings.minibatch * settings.minibatch
    updates = settings.epochs * whole // settings.minibatch
    keys = ("observation", "action", "action_log_prob", "advantage", "value_target")
    for iteration in range(settings.iterations):
        watch.running = iteration >= settings.burn_in
        rate.fill_(settings.learning_rate * (1 - iteration / settings.iterations))
        with watch("collection", frames):
            data = collect(env, policy, settings, returns)
        with watch("update", updates):
            data = add_advantage(data, critic, settings)
            flat = data.select(*keys).reshape(-1)
            for _ in range(settings.epochs):
                order = torch.randperm(frames, device=flags.device)
                for index in order[:whole].split(settings.minibatch):
                    run_update(flat[index])
        run.frames += frames
        mean = returns.take()
        if mean is not None:
            run.steps.append(run.frames)
            run.returns.append(mean)
        yield run
    run.evaluation = common.evaluate(
        actor,
        settings.env,
        seed=1000 + flags.seed,
        device=flags.device,
        episodes=settings.episodes,
    )
    yield run.finish(watch, begin)


def main(argv: list[str] | None = None) -> Run:
    """Runs the loop from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    Flags.add_arguments(parser)
    parser.add_argument("--env", choices=("Pendulum-v1", "HalfCheetah-v5"), default="Pendulum-v1")
    parser.add_argument("--distribution", choices=DISTRIBUTIONS, default=DISTRIBUTIONS[0])
    parser.add_argument("--iterations", type=int)
    args = parser.parse_args(argv)
    settings = CHEETAH if args.env == "HalfCheetah-v5" else Settings()
    settings = replace(settings, distribution=args.distribution)
    if args.iterations:
        settings = replace(settings, iterations=args.iterations)
    return common.run_alone(train(settings, Flags.of(args)))


if __name__ == "__main__":
    main()
