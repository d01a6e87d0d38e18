"""PPO with discrete actions: CartPole-v1, and a variant with masked actions.

The clipped surrogate of Schulman et al., 2017 (arXiv:1707.06347), with TorchRL's ClipPPOLoss and
generalised advantages (arXiv:1506.02438). The actor's head is a Categorical or a MaskedCategorical
of upstream or of fastprob; all else is the same.

    python -m bench.loops.ppo_discrete --impl fastprob --masked

In the masked variant there are two copies of each push, left, right, left, right, and at each step
one copy of each is masked at random; a masked action that is taken ends the run with an error. On a
CPU the loop reaches a return of 475 within a minute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule, set_interaction_type
from torch import Tensor, nn
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value.functional import generalized_advantage_estimate

from bench.loops import common
from bench.loops.common import Flags, Returns, Run, Stopwatch


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters for CartPole-v1."""

    env: str = "CartPole-v1"
    masked: bool = False
    envs: int = 32
    steps: int = 128
    iterations: int = 30
    epochs: int = 6
    minibatch: int = 512
    learning_rate: float = 3e-3
    gamma: float = 0.99
    lmbda: float = 0.95
    clip: float = 0.2
    entropy: float = 1e-3
    max_grad_norm: float = 0.5
    # Values reach 100 under this discount; a fiftieth of them keeps the value loss near 1, which
    # shares the limit on the gradient with the policy's.
    reward_scale: float = 0.02
    # Iterations that fill caches, compile and capture, and are not timed.
    burn_in: int = 2
    episodes: int = 50


class Masks:
    """Two copies of each action, of which one is masked at random at each step.

    Args:
        actions: of the environment, n. The policy has 2 n; action a means a modulo n.
        seed: of the choice.
        device: of the masks.
    """

    def __init__(self, actions: int, seed: int, device: str) -> None:
        self.actions = actions
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, observation: Tensor) -> dict[str, Tensor]:
        """Returns ``mask``, ``[rows, 2 n]``, true where an action may be taken."""
        size = (observation.shape[0], self.actions)
        first = torch.rand(size, generator=self.generator, device=observation.device) < 0.5
        return {"mask": torch.cat([first, ~first], -1)}

    def act(self, action: Tensor) -> Tensor:
        """The environment's action."""
        return action % self.actions


def make_actor(settings: Settings, flags: Flags, env: common.Environment) -> nn.Module:
    """An MLP, and the probabilistic module under comparison."""
    impl = flags.side
    actions = 2 * env.actions if settings.masked else env.actions
    net = common.mlp(env.observation.shape[-1], actions, last_gain=0.01)
    head = impl.SafeProbabilisticModule(
        in_keys=["logits", "mask"] if settings.masked else ["logits"],
        out_keys=["action"],
        spec=impl.specs.Categorical(actions, device=flags.device),
        distribution_class=impl.MaskedCategorical if settings.masked else impl.Categorical,
        return_log_prob=True,
        # An explicit key: the two sides differ in the default.
        log_prob_key="action_log_prob",
        default_interaction_type=InteractionType.RANDOM,
    )
    params = TensorDictModule(net, in_keys=["observation"], out_keys=["logits"])
    return impl.SafeProbabilisticTensorDictSequential(params, head).to(flags.device)


@torch.no_grad()
def collect(
    env: common.Environment,
    policy: Callable[[TensorDict], TensorDict],
    masks: Masks | None,
    settings: Settings,
    returns: Returns,
) -> TensorDict:  # [envs, steps]
    """Steps all environments, and keeps what the update needs."""
    kept = []
    with set_interaction_type(InteractionType.RANDOM):
        for _ in range(settings.steps):
            inputs = {"observation": env.observation}
            if masks is not None:
                inputs |= masks.draw(env.observation)
            data = policy(TensorDict(inputs, batch_size=[settings.envs]))
            action = data["action"]
            following, reward, terminated, truncated = env.step(
                action if masks is None else masks.act(action)
            )
            done = terminated | truncated
            returns.add(reward, done)
            kept.append(
                TensorDict(
                    {
                        **inputs,
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
    data = torch.stack(kept, 1)
    if masks is not None and not bool(_allowed(data["mask"], data["action"]).all()):
        raise RuntimeError("a masked action was taken")
    return data


def _allowed(mask: Tensor, action: Tensor) -> Tensor:
    return mask.gather(-1, action.unsqueeze(-1)).squeeze(-1)


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

    Raises:
        RuntimeError: if a masked action was taken.
    """
    begin = time.perf_counter()
    torch.manual_seed(flags.seed)
    env = common.make_env(settings.env, settings.envs, flags.seed, flags.device)
    masks = Masks(env.actions, flags.seed, flags.device) if settings.masked else None
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
    run = Run("ppo_discrete" + " masked" * settings.masked, settings.env, flags)
    frames = settings.envs * settings.steps
    whole = frames // settings.minibatch * settings.minibatch
    updates = settings.epochs * whole // settings.minibatch
    keys = ["observation", "action", "action_log_prob", "advantage", "value_target"]
    keys += ["mask"] if settings.masked else []
    for iteration in range(settings.iterations):
        watch.running = iteration >= settings.burn_in
        rate.fill_(settings.learning_rate * (1 - iteration / settings.iterations))
        with watch("collection", frames):
            data = collect(env, policy, masks, settings, returns)
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
        inputs=None if masks is None else masks.draw,
        act=None if masks is None else masks.act,
    )
    yield run.finish(watch, begin)


def main(argv: list[str] | None = None) -> Run:
    """Runs the loop from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    Flags.add_arguments(parser)
    parser.add_argument("--masked", action="store_true", help="the variant with masked actions")
    parser.add_argument("--iterations", type=int)
    args = parser.parse_args(argv)
    settings = replace(Settings(), masked=args.masked)
    if args.iterations:
        settings = replace(settings, iterations=args.iterations)
    return common.run_alone(train(settings, Flags.of(args)))


if __name__ == "__main__":
    main()
