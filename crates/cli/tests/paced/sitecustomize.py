"""Gives each step of a real vLLM or SGLang engine a minimum duration, as on a GPU.

A step of a tiny model on the CPU takes almost no time. Its engine then keeps a core busy, and
several engines slow down each other and the router, so that a test measures the machine. With

    PYTHONPATH=crates/cli/tests/paced STEP_MS=20 vllm serve ...

a step takes at least STEP_MS milliseconds; the engine sleeps for the rest of them. With
STEP_US_PER_TOKEN=100, a step of vLLM that computes many tokens takes at least 100 microseconds for
each of them.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time

# Minimum duration of a step, in seconds. 0 changes nothing.
STEP = float(os.environ.get("STEP_MS", "0")) / 1000
# Minimum duration for each token that a step computes, in seconds.
STEP_PER_TOKEN = float(os.environ.get("STEP_US_PER_TOKEN", "0")) / 1e6
# Class and method that run one step, by module.
STEPS = {
    "vllm.v1.worker.gpu_worker": ("Worker", "execute_model"),
    "sglang.srt.managers.tp_worker": ("TpModelWorker", "forward_batch_generation"),
}


def paced(step):
    """Returns a step that sleeps until its minimum duration is over."""

    def wrapped(self, batch, *args, **kwargs):
        start = time.perf_counter()
        result = step(self, batch, *args, **kwargs)
        # vLLM also calls the method for batches without tokens, which are not delayed.
        tokens = getattr(batch, "total_num_scheduled_tokens", 1)
        if tokens > 0:
            duration = max(STEP, tokens * STEP_PER_TOKEN)
            time.sleep(max(0.0, start + duration - time.perf_counter()))
        return result

    return wrapped


class Pacer(importlib.abc.MetaPathFinder):
    """Wraps the step of an engine when its module is imported. Other interpreters are unaffected."""

    def find_spec(self, name, path, target=None):
        if name not in STEPS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def load_and_wrap(module):
            load(module)
            class_name, method_name = STEPS[name]
            owner = getattr(module, class_name)
            setattr(owner, method_name, paced(getattr(owner, method_name)))
            print(f"{name}: a step takes {STEP * 1000:.0f} ms", file=sys.stderr)

        spec.loader.exec_module = load_and_wrap
        return spec


if STEP > 0:
    sys.meta_path.insert(0, Pacer())
