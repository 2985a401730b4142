"""Functions that workers run to call the vendors' kernels, in the form of stand-ins."""

from tests import attention_cases, cudnn_stand_in, vendor_kernels


STAND_INS = {
    # the stand-in, and the name of the kernel that calls it
    "torch_flash": (vendor_kernels.torch_flash, "torch_flash"),
    "flash_attn_2": (vendor_kernels.flash_attn_2, "flash_attn_2"),
    "flash_attn_3": (vendor_kernels.flash_attn_3, "flash_attn_3"),
    "flash_attn_3 from the hub": (vendor_kernels.flash_attn_3_from_the_hub, "flash_attn_3"),
    "flash_attn_4": (vendor_kernels.flash_attn_4, "flash_attn_4"),
    "cudnn": (cudnn_stand_in.cudnn, "cudnn"),
}


def layer_errors(stand_in, todo):
    """Return the errors of out, dq, dk, dv (and d_sinks) for each case, and the vendor's forward and backward
    calls."""
    provide, kernel = STAND_INS[stand_in]
    with provide() as vendor:
        errors = attention_cases.attention_errors([case._replace(kernel=kernel) for case in todo])
    return errors, (vendor.forwards, vendor.backwards)
