"""TorchRL's losses as cases: what faster probabilistic modules are worth inside of an objective.

The sizes are those of TorchRL's own benchmark of its objectives (``benchmarks/`` there,
``test_objectives_benchmarks.py``): 128 rows, 8 observations, 4 actions, a TanhNormal actor. The
loss is taken forward, and differentiated with respect to all parameters. Upstream's actor stands
beside the same actor after ``fastprob.accelerate``; all else is TorchRL's on both sides.

The reference is the loss with upstream's actor in eager mode: there is no float64 form of TorchRL's
losses to hold them to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn

from bench import providers
from bench.families import Expected
from bench.gate import Problem, Provider, ends
from bench.implementations import Implementation

BATCH, OBSERVATIONS, ACTIONS, HIDDEN = 128, 8, 4, 64
SHAPE = (BATCH, ACTIONS)
NAMES = ("sac", "ppo", "a2c", "reinforce")


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(),
        nn.Linear(HIDDEN, outputs),
    )  # fmt: skip


def _actor() -> nn.Module:
    from torchrl.modules import ProbabilisticActor, TanhNormal

    net = nn.Sequential(_mlp(OBSERVATIONS, 2 * ACTIONS), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def _critic() -> nn.Module:
    return TensorDictModule(
        _mlp(OBSERVATIONS, 1), in_keys=["observation"], out_keys=["state_value"]
    )


class _QNet(nn.Module):
    """Q(s, a), [rows, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _mlp(OBSERVATIONS + ACTIONS, 1)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([observation, action], -1))


def make_loss(name: str, accelerated: bool, device: str = "cpu") -> nn.Module:
    """Builds one of TorchRL's losses; the weights are the same at each call.

    Args:
        name: one of ``NAMES``.
        accelerated: whether the actor goes through ``fastprob.accelerate``.
        device: of the parameters.

    Raises:
        ValueError: for another name.
    """
    from torchrl.data import Bounded
    from torchrl.objectives import A2CLoss, ClipPPOLoss, ReinforceLoss, SACLoss, SoftUpdate

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        actor = _actor()
        if accelerated:
            import fastprob

            actor = fastprob.accelerate(actor)
        if name == "sac":
            q = TensorDictModule(_QNet(), ["observation", "action"], ["state_action_value"])
            spec = Bounded(-1.0, 1.0, shape=(ACTIONS,))
            loss = SACLoss(actor, q, action_spec=spec)
            # Target networks belong to an updater, or each call warns.
            SoftUpdate(loss, eps=0.995)
            return loss.to(device)
        if name == "ppo":
            return ClipPPOLoss(actor, _critic()).to(device)
        if name == "a2c":
            return A2CLoss(actor, _critic()).to(device)
        if name == "reinforce":
            return ReinforceLoss(actor, critic_network=_critic()).to(device)
    raise ValueError(f"unknown objective {name!r}; expected one of {', '.join(NAMES)}")


def make_batch(device: str = "cpu") -> TensorDict:
    """A batch with everything that the four losses read."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    no = torch.zeros(BATCH, 1, dtype=torch.bool)
    return TensorDict(
        {
            "observation": normal(OBSERVATIONS),
            # |tanh| below 0.97: stored actions at the bounds have no finite score.
            "action": normal(ACTIONS).clamp(-2, 2).tanh(),
            "action_log_prob": normal().mul(0.1).sub(3.0),
            "advantage": normal(1),
            "value_target": normal(1),
            "next": {
                "observation": normal(OBSERVATIONS),
                "reward": normal(1),
                "done": no,
                "terminated": no.clone(),
            },
        },
        batch_size=[BATCH],
        device=None if device == "cpu" else device,
    )


def problem(name: str) -> Callable[..., Problem]:
    """Returns the builder of a case: an objective, forward and backward."""

    def build(
        sides: Mapping[str, Implementation], shape: tuple[int, int] = SHAPE, device: str = "cpu"
    ) -> Problem:
        def make(role: str, mode: str | None = "eager") -> Provider:
            loss = make_loss(name, sides[role].name == providers.FASTPROB, device)
            # Target networks have none.
            wanted = [p for p in loss.parameters() if p.requires_grad]
            run: Callable[[Any], Any] = loss
            if mode != "eager":
                run = torch.compile(loss, dynamic=False, mode=mode)

            def call(batch: TensorDict) -> dict[str, Tensor]:
                if mode == "reduce-overhead":
                    torch.compiler.cudagraph_mark_step_begin()
                out = run(batch)
                keys = [key for key in out.keys() if key.startswith("loss_")]  # noqa: SIM118
                losses = {key: out.get(key) for key in keys}
                total = sum(losses.values())
                grads = torch.autograd.grad(total, wanted, allow_unused=True)
                return {**losses, "grads": grads}  # type: ignore[dict-item]

            batches = providers.batches(dict(make_batch(device).items()), BATCH)
            # TanhNormal has no entropy in closed form: PPO and A2C draw for it, SAC for its action.
            same = device == "cpu" and (mode == "eager" or role == providers.FASTPROB)
            return Provider(providers.in_turn(call, batches), _results, same)

        # Made when first asked for: a gate that refuses a provider early needs no reference.
        reference: list[Provider] = []

        def expected(seed: int | None) -> dict[str, Expected]:
            if not reference:
                upstream = dict(sides) | {"upstream": _upstream()}
                loss = problem(name)(upstream, shape, device)
                reference.append(loss.makers["upstream"]())
            if seed is not None:
                torch.manual_seed(seed)
            with torch.enable_grad():
                got = reference[0].read(reference[0].call())
            # Sums over 128 rows, in another order: a few hundred roundings of terms of size 1.
            return {k: Expected(v, 1e-4 + 1e-4 * v.abs()) for k, v in _detached(got).items()}

        def draw() -> dict[str, Tensor]:
            return {key: ends(item.value) for key, item in expected(None).items()}

        makers: dict[str, Callable[[], Provider]] = {}
        for role in sides:
            makers[role] = lambda role=role: make(role)
            makers[f"{role} compiled"] = lambda role=role: make(role, None)
            makers[f"{role} reduce-overhead"] = lambda role=role: make(role, "reduce-overhead")
        return Problem(makers, expected, rescore=lambda got: {}, draw=draw, grad=True)

    return build


def _upstream() -> Implementation:
    from bench.implementations import implementation

    return implementation("upstream")


def _results(out: dict[str, Any]) -> dict[str, Tensor]:
    """The losses, [1] each, and all gradients in one vector."""
    grads = [g.reshape(-1) for g in out["grads"] if g is not None]
    return {
        **{key: value.reshape(1) for key, value in out.items() if key != "grads"},
        "grads": torch.cat(grads),
    }


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().double() for key, value in values.items()}
