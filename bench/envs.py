"""Pendulum-v1 and CartPole-v1, batched and in tensors, on any device.

The equations of motion, bounds, rewards and time limits are those of gymnasium's environments, and
`tests/test_envs.py` compares them step by step. Nothing here waits for the device, so that a step
can be captured in a CUDA graph. Names follow TorchRL: `step` has the signature of
`step_and_maybe_reset`, and an environment that is done starts anew in the same step, as
gymnasium's vector environments do under `AutoresetMode.SAME_STEP`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor


class TensorEnv(ABC):
    """A batched environment.

    Args:
        dtype: of states, observations and rewards.
        device: where they are.
        generator: source of initial states; torch's default generator where it is None.
    """

    max_steps: int

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self.generator = generator

    @abstractmethod
    def initial(self, batch_size: Sequence[int]) -> Tensor:
        """Random initial states, `[*batch, state]`."""

    @abstractmethod
    def observe(self, state: Tensor) -> Tensor:
        """Observations `[*batch, observation]` of states `[*batch, state]`."""

    @abstractmethod
    def move(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the dynamics.

        Args:
            state: `[*batch, state]`.
            action: `[*batch, action]`.

        Returns:
            the next states, the rewards `[*batch]`, and whether the episodes end `[*batch]`.
        """

    def reset(self, batch_size: Sequence[int]) -> TensorDict:
        """New episodes: `state`, `observation` and `step_count`."""
        state = self.initial(batch_size)
        return TensorDict(
            state=state,
            observation=self.observe(state),
            step_count=torch.zeros(*batch_size, 1, dtype=torch.int64, device=self.device),
            batch_size=batch_size,
        )

    def step(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDict]:
        """One step of every environment.

        Args:
            tensordict: `state`, `step_count` and `action`, `[*batch]`.

        Returns:
            the tensordict with the outcome under `next`; and where the environments are then, those
            that are done in a new episode.
        """
        batch_size = tensordict.batch_size
        state, reward, terminated = self.move(tensordict["state"], tensordict["action"])
        count = tensordict["step_count"] + 1
        terminated = terminated.unsqueeze(-1)
        truncated = count >= self.max_steps
        done = terminated | truncated
        observation = self.observe(state)
        tensordict["next"] = TensorDict(
            state=state,
            observation=observation,
            step_count=count,
            reward=reward.unsqueeze(-1),
            terminated=terminated,
            truncated=truncated,
            done=done,
            batch_size=batch_size,
        )
        # Drawn for all and taken by few: shapes must not depend on who is done.
        fresh = self.initial(batch_size)
        root = TensorDict(
            state=torch.where(done, fresh, state),
            observation=torch.where(done, self.observe(fresh), observation),
            step_count=torch.where(done, torch.zeros_like(count), count),
            batch_size=batch_size,
        )
        return tensordict, root

    def _uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform in [-1, 1)."""
        options = {"dtype": self.dtype, "device": self.device, "generator": self.generator}
        return torch.rand(*shape, **options) * 2 - 1


class Pendulum(TensorEnv):
    """Swing a pendulum up and keep it there; gymnasium's Pendulum-v1.

    State `[angle, angular velocity]`, 0 being upright, in radians and radians per second; action
    `[torque]` in newton metres, clipped to 2.
    """

    max_steps = 200
    max_speed = 8.0
    max_torque = 2.0
    dt = 0.05
    g = 10.0
    m = 1.0
    length = 1.0

    def initial(self, batch_size: Sequence[int]) -> Tensor:
        drawn = self._uniform((*batch_size, 2))
        return torch.cat([drawn[..., :1] * math.pi, drawn[..., 1:]], -1)

    def observe(self, state: Tensor) -> Tensor:
        angle, speed = state.unbind(-1)
        return torch.stack([torch.cos(angle), torch.sin(angle), speed], -1)

    def move(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle, speed = state.unbind(-1)
        torque = action[..., 0].clamp(-self.max_torque, self.max_torque)
        # The remainder of a positive divisor is positive: an angle in [-pi, pi).
        upright = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        cost = upright**2 + 0.1 * speed**2 + 0.001 * torque**2
        gravity = 3 * self.g / (2 * self.length) * torch.sin(angle)
        speed = speed + (gravity + 3.0 / (self.m * self.length**2) * torque) * self.dt
        speed = speed.clamp(-self.max_speed, self.max_speed)
        angle = angle + speed * self.dt
        ended = torch.zeros_like(cost, dtype=torch.bool)
        return torch.stack([angle, speed], -1), -cost, ended


class CartPole(TensorEnv):
    """Balance a pole on a cart; gymnasium's CartPole-v1.

    State and observation `[position, velocity, angle, angular velocity]`, in metres, radians and
    seconds; action `[0 or 1]`, to the left or to the right, or the same one-hot `[2]`.

    Source: Barto, Sutton and Anderson, 1983; the equations as corrected by Florian, 2007.
    """

    max_steps = 500
    gravity = 9.8
    mass_cart = 1.0
    mass_pole = 0.1
    half_length = 0.5
    force = 10.0
    dt = 0.02
    max_position = 2.4
    max_angle = 12 * 2 * math.pi / 360

    def initial(self, batch_size: Sequence[int]) -> Tensor:
        return self._uniform((*batch_size, 4)) * 0.05

    def observe(self, state: Tensor) -> Tensor:
        return state

    def move(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, x_speed, angle, angle_speed = state.unbind(-1)
        right = action[..., -1] > 0
        force = torch.where(right, self.force, -self.force).to(state.dtype)
        mass = self.mass_cart + self.mass_pole
        moment = self.mass_pole * self.half_length
        cos, sin = torch.cos(angle), torch.sin(angle)
        push = (force + moment * angle_speed**2 * sin) / mass
        angle_acceleration = (self.gravity * sin - cos * push) / (
            self.half_length * (4.0 / 3.0 - self.mass_pole * cos**2 / mass)
        )
        x_acceleration = push - moment * angle_acceleration * cos / mass
        # Explicit Euler: positions move with the speeds from before.
        new = [
            x + self.dt * x_speed,
            x_speed + self.dt * x_acceleration,
            angle + self.dt * angle_speed,
            angle_speed + self.dt * angle_acceleration,
        ]
        ended = (new[0].abs() > self.max_position) | (new[2].abs() > self.max_angle)
        return torch.stack(new, -1), torch.ones_like(x), ended
