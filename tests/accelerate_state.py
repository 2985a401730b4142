import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from hf_flashcp.planning.settings import remember_owner
from tests.device import ON_CPU


def without_plugin(function, *args):
    """Call a function in a process in which no plugin has been created."""
    remember_owner(None)
    return function(*args)


def fresh_accelerate():
    """Reset accelerate's process-wide state, so that one worker can run many configurations."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
    remember_owner(None)
    forbid_tf32()


def forbid_tf32():
    """Turn TF32 off: on a GPU, an Accelerator for compiled models turns it on for the whole process."""
    if not ON_CPU:
        torch.backends.cuda.matmul.allow_tf32 = False
