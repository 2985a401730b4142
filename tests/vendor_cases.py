"""Functions that workers run to call the vendors' kernels, in the form of stand-ins."""

from tests import attention_cases, vendor_kernels


STAND_INS = {
    "flash_attn_2": vendor_kernels.flash_attn_2,
    "flash_attn_3": vendor_kernels.flash_attn_3,
    "flash_attn_4": vendor_kernels.flash_attn_4,
}


def layer_errors(kernel, todo):
    """Return the errors of out, dq, dk, dv (and d_sinks) for each case, and the vendor's forward and backward
    calls."""
    with STAND_INS[kernel]() as vendor:
        errors = attention_cases.attention_errors([case._replace(kernel=kernel) for case in todo])
    return errors, (vendor.forwards, vendor.backwards)
