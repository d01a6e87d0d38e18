"""bench/envs.py against gymnasium, step by step."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from scipy import stats

from bench.envs import CartPole, Pendulum

ENVS = [(Pendulum, "Pendulum-v1"), (CartPole, "CartPole-v1")]
# float32: a step rounds a handful of times, each by 6e-8 of a value of up to 12 (an angle), and the
# states are handed over anew in each step, so that nothing accumulates.
CLOSE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 2e-6, "atol": 4e-6},
}
# What gymnasium returns as observations is float32 in either case.
OBSERVED = {"rtol": 2e-6, "atol": 4e-6}


def actions(name: str, rng: np.random.Generator, count: int) -> np.ndarray:
    if name == "Pendulum-v1":
        # Beyond the torque limit of 2 as well.
        return rng.uniform(-3, 3, (count, 1))
    return rng.integers(0, 2, (count, 1))


def gym_step(env: gymnasium.Env, name: str, action: np.ndarray) -> tuple:
    return env.step(action if name == "Pendulum-v1" else int(action[0]))


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(("make", "name"), ENVS)
def test_steps_are_gymnasiums(make, name, dtype):
    """Six environments through two time limits or many falls, resets included."""
    count, length = 6, 230
    rng = np.random.default_rng(0)
    theirs = [gymnasium.make(name, disable_env_checker=True) for _ in range(count)]
    for i, env in enumerate(theirs):
        env.reset(seed=i)
    ours = make(dtype=dtype)
    root = ours.reset([count])

    def hand_over(rows):
        """Initial states are random: ours take gymnasium's."""
        for i in rows:
            root["state"][i] = torch.as_tensor(np.array(theirs[i].unwrapped.state), dtype=dtype)
        root["observation"] = ours.observe(root["state"])

    hand_over(range(count))
    ended = {"terminated": 0, "truncated": 0}
    for _ in range(length):
        action = actions(name, rng, count)
        root["action"] = torch.as_tensor(action, dtype=dtype if action.dtype.kind == "f" else None)
        counts = root["step_count"].clone()
        data, root = ours.step(root)
        after = data["next"]
        done = []
        for i, env in enumerate(theirs):
            observation, reward, terminated, truncated, _ = gym_step(env, name, action[i])
            state = torch.as_tensor(np.array(env.unwrapped.state), dtype=dtype)
            torch.testing.assert_close(after["state"][i], state, **CLOSE[dtype])
            torch.testing.assert_close(
                after["observation"][i].float(), torch.as_tensor(observation), **OBSERVED
            )
            assert after["reward"][i].item() == pytest.approx(float(reward), rel=2e-6, abs=4e-6)
            assert after["terminated"][i].item() is bool(terminated)
            assert after["truncated"][i].item() is bool(truncated)
            assert after["done"][i].item() is bool(terminated or truncated)
            assert after["step_count"][i] == counts[i] + 1
            ended["terminated"] += terminated
            ended["truncated"] += truncated
            if terminated or truncated:
                done.append(i)
                env.reset()
        going = [i for i in range(count) if i not in done]
        # The next root goes on where the step ended; those that are done have a new episode.
        for key in ("state", "observation", "step_count"):
            assert torch.equal(root[key][going], after[key][going])
        assert (root["step_count"][done] == 0).all()
        if done:
            assert not torch.isclose(root["state"][done], after["state"][done]).all(-1).any()
            hand_over(done)
        # From here on the same numbers, so that rounding does not accumulate in float32.
        hand_over(going)
    for env in theirs:
        env.close()
    assert ended["truncated" if name == "Pendulum-v1" else "terminated"] > 5


@pytest.mark.parametrize(("make", "name"), ENVS)
def test_initial_states_are_distributed_as_gymnasiums(make, name):
    env = gymnasium.make(name).unwrapped
    env.reset(seed=0)
    theirs = []
    for _ in range(3000):
        env.reset()
        theirs.append(np.array(env.state))
    ours = make().reset([3000])
    assert ours["step_count"].eq(0).all()
    for theirs_of_one, ours_of_one in zip(np.stack(theirs, 1), ours["state"].T, strict=True):
        assert stats.ks_2samp(theirs_of_one, ours_of_one.numpy()).pvalue > 1e-3


def test_cartpole_is_truncated_after_500_steps():
    """Random actions end every episode long before; a pole that balances does not."""
    env = CartPole(dtype=torch.float64)
    root = env.reset([2])
    for step in range(1, 501):
        # A little feedback keeps the pole up.
        _, speed, angle, angle_speed = root["state"].unbind(-1)
        push = 10 * angle + angle_speed + 0.3 * speed
        root["action"] = (push > 0).long().unsqueeze(-1)
        data, root = env.step(root)
        assert not data["next", "terminated"].any()
        assert data["next", "truncated"].all().item() is (step == 500)
    assert (root["step_count"] == 0).all()


def test_cartpole_takes_one_hot_actions():
    env = CartPole()
    root = env.reset([8])
    index = torch.randint(0, 2, (8, 1))
    a = env.step(root.copy().set("action", index))[0]
    b = env.step(root.copy().set("action", torch.nn.functional.one_hot(index[:, 0], 2)))[0]
    assert torch.equal(a["next", "state"], b["next", "state"])


@pytest.mark.parametrize("make", [Pendulum, CartPole])
def test_any_batch_and_a_generator(make):
    def roots():
        env = make(generator=torch.Generator().manual_seed(3))
        return [env.reset(batch) for batch in ([], [1], [2, 3])]

    for a, b in zip(roots(), roots(), strict=True):
        assert torch.equal(a["state"], b["state"])
        assert a["observation"].shape == (*a.batch_size, 3 if make is Pendulum else 4)
    state = torch.get_rng_state()
    roots()
    assert torch.equal(state, torch.get_rng_state())
