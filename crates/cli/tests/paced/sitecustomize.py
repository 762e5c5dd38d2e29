"""Gives each step of a real vLLM or SGLang a length, as a GPU would.

A tiny model on the CPU has no step to speak of: its engine takes all of a core, several of
them slow one another and the router, and what a test then measures is the machine. With

    PYTHONPATH=crates/cli/tests/paced STEP_MS=20 vllm serve ...

a step lasts at least STEP_MS milliseconds, and sleeps through what is left of them.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time

STEP = float(os.environ.get("STEP_MS", "0")) / 1000
STEPS = {
    "vllm.v1.worker.gpu_worker": ("Worker", "execute_model"),
    "sglang.srt.managers.tp_worker": ("TpModelWorker", "forward_batch_generation"),
}


def paced(step):
    def wrapped(self, batch, *args, **kwargs):
        begun = time.perf_counter()
        result = step(self, batch, *args, **kwargs)
        # vLLM also calls it with nothing to compute.
        if getattr(batch, "total_num_scheduled_tokens", 1) > 0:
            time.sleep(max(0.0, begun + STEP - time.perf_counter()))
        return result

    return wrapped


class Pacer(importlib.abc.MetaPathFinder):
    """Wraps a step when its module is imported: an interpreter that needs none pays nothing."""

    def find_spec(self, name, path, target=None):
        if name not in STEPS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def load_and_wrap(module):
            load(module)
            owner, step = STEPS[name]
            owner = getattr(module, owner)
            setattr(owner, step, paced(getattr(owner, step)))
            print(f"{name}: a step takes {STEP * 1000:.0f} ms", file=sys.stderr)

        spec.loader.exec_module = load_and_wrap
        return spec


if STEP > 0:
    sys.meta_path.insert(0, Pacer())
