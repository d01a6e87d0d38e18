"""Three training loops, a file each, that run with upstream's actor or with fastprob's.

    python -m bench.loops.ppo_continuous --impl fastprob --distribution TanhNormal
    python -m bench.loops.ppo_discrete --impl upstream --masked
    python -m bench.loops.sac --impl fastprob --compile

``python -m bench loops`` runs all of them, three seeds a side.
"""
