import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from hf_flashcp.planning.settings import remember_owner
from tests.device import ON_CPU


def without_plugin(function, *args):
    """Calls a function in a process that has made no plugin."""
    remember_owner(None)
    return function(*args)


def fresh_accelerate():
    """Forgets accelerate's process-wide state, so that one worker can serve many set-ups."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
    remember_owner(None)
    forbid_tf32()


def forbid_tf32():
    """On a GPU an Accelerator for compiled models lets fp32 be multiplied in TF32, in the whole process."""
    if not ON_CPU:
        torch.backends.cuda.matmul.allow_tf32 = False
