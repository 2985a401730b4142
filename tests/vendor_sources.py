"""Checks the stand-ins against the vendors' published packages: `python -m tests.vendor_sources`.

It downloads the pinned versions with pip (about 27 MB) and compares the signatures in their sources with those of
tests/vendor_kernels.py, tests/cudnn_stand_in.py and tests/recurrent_kernels.py. FlashAttention-3's library, in a wheel
of 111 MB, is compared only with `--large`. Nothing is imported or installed.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tests import cudnn_stand_in, recurrent_kernels, vendor_kernels


FLASH_ATTN = ("2.7.3", "2.8.3")
XFORMERS, CUDNN = "0.0.34", "1.18.0"
RECURRENT = {
    # package: file of a function
    "fla-core==0.6.0": {
        "chunk_gated_delta_rule": "fla/ops/gated_delta_rule/chunk.py",
        "chunk_kda": "fla/ops/kda/chunk.py",
    },
    "mamba-ssm==2.3.2.post1": {
        "mamba_chunk_scan_combined": "mamba_ssm/ops/triton/ssd_combined.py",
        "mamba_split_conv1d_scan_combined": "mamba_ssm/ops/triton/ssd_combined.py",
    },
    "causal-conv1d==1.7.0": {"causal_conv1d_fn": "causal_conv1d/causal_conv1d_interface.py"},
}
SKIP_BUILDS = {f"{name}_SKIP_CUDA_BUILD": "TRUE" for name in ("FLASH_ATTENTION", "MAMBA", "CAUSAL_CONV1D")}


def download(requirement, folder, *options):
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *options, requirement]
    subprocess.run(command, check=True, env={**os.environ, **SKIP_BUILDS})
    name = requirement.split("==")[0].replace("-", "[-_]")
    (file,) = (path for path in Path(folder).iterdir() if re.match(f"{name}-{requirement.split('==')[1]}", path.name))
    return file


def member(archive, ending):
    """Return the bytes of the file in a wheel or source archive whose path ends like this."""
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            (found,) = (each for each in tar.getmembers() if each.name.endswith(ending))
            return tar.extractfile(found).read()
    with zipfile.ZipFile(archive) as wheel:
        (found,) = (name for name in wheel.namelist() if name.endswith(ending))
        return wheel.read(found)


def parameters(source, function):
    """Return the parameters of a function in Python source, as `[(name, default or None)]`."""
    (node,) = (each for each in ast.parse(source).body if isinstance(each, ast.FunctionDef) and each.name == function)
    names = [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(names) - len(node.args.defaults)) + [ast.unparse(each) for each in node.args.defaults]
    found = [(name.arg, default) for name, default in zip(names, defaults)]
    return found + [
        (name.arg, default and ast.unparse(default))
        for name, default in zip(node.args.kwonlyargs, node.args.kw_defaults)
    ]


def ours(text):
    return parameters(f"def function({text}): ...", "function")


def compare(what, theirs, stand_in):
    if theirs == stand_in:
        print(f"{what}: the same {len(theirs)} parameters")
        return 0
    print(f"{what} differs:\n  theirs {[each for each in theirs if each not in stand_in]}")
    print(f"  ours   {[each for each in stand_in if each not in theirs]}")
    return 1


def flash_attn_2(folder):
    wrong = 0
    for version in FLASH_ATTN:
        archive = download(f"flash-attn=={version}", folder, "--no-binary", ":all:", "--no-build-isolation")
        source = member(archive, "flash_attn/flash_attn_interface.py")
        for function, text in (
            ("_flash_attn_varlen_forward", vendor_kernels.FA2_FORWARD),
            ("_flash_attn_varlen_backward", vendor_kernels.FA2_BACKWARD),
        ):
            wrong += compare(f"flash-attn {version} {function}", parameters(source, function), ours(text))
    return wrong


def flash_attn_4(folder):
    wrong = 0
    for version, (forward, backward, results) in vendor_kernels.FA4.items():
        source = member(download(f"flash-attn-4=={version}", folder), "flash_attn/cute/interface.py")
        for function, text in (("_flash_attn_fwd", forward), ("_flash_attn_bwd", backward)):
            wrong += compare(f"flash-attn-4 {version} {function}", parameters(source, function), ours(text))
        returned = number_of_results(source, "_flash_attn_fwd")
        print(f"flash-attn-4 {version} _flash_attn_fwd returns {returned} results")
        wrong += returned != results
    return wrong


def number_of_results(source, function):
    (node,) = (each for each in ast.parse(source).body if isinstance(each, ast.FunctionDef) and each.name == function)
    last = [each for each in ast.walk(node) if isinstance(each, ast.Return) and isinstance(each.value, ast.Tuple)][-1]
    return len(last.value.elts)


def cudnn(folder):
    """Compare names only: the compiled module documents its signatures in its docstrings' first lines."""
    archive = download(f"nvidia-cudnn-frontend=={CUDNN}", folder)
    with zipfile.ZipFile(archive) as wheel:
        (name,) = (each for each in wheel.namelist() if "_compiled_module" in each)
        strings = wheel.read(name)
    wrong = 0
    for text in (cudnn_stand_in.SDPA, cudnn_stand_in.SDPA_BACKWARD):
        missing = [name for name, _ in ours(text) if name.encode() + b"\0" not in strings]
        print(f"nvidia-cudnn-frontend {CUDNN}: {len(ours(text))} parameters, not found: {missing or 'none'}")
        wrong += bool(missing)
    return wrong


def recurrent(folder):
    wrong = 0
    stand_ins = Path(recurrent_kernels.__file__).read_text(encoding="utf-8")
    for requirement, functions in RECURRENT.items():
        source_only = requirement.startswith(("mamba", "causal"))
        archive = download(requirement, folder, *["--no-binary", ":all:", "--no-build-isolation"] * source_only)
        for function, file in functions.items():
            theirs, stand_in = (parameters(each, function) for each in (member(archive, file), stand_ins))
            wrong += compare(f"{requirement} {function}", theirs, stand_in)
    return wrong


def flash_attn_3(folder):
    archive = download(f"xformers=={XFORMERS}", folder)
    library = member(archive, "flash_attn_3/_C.so").decode("latin-1")
    wrong = 0
    for schema in (vendor_kernels.FA3_FORWARD, vendor_kernels.FA3_BACKWARD):
        found = re.sub(r"\s+", "", schema) in re.sub(r"\s+", "", library)
        print(f"xformers {XFORMERS}: schema {schema.split('(')[0]} {'found' if found else 'not found'}")
        wrong += not found
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="also download FlashAttention-3's library")
    checks = [flash_attn_2, flash_attn_4, cudnn, recurrent] + [flash_attn_3] * parser.parse_args().large
    with tempfile.TemporaryDirectory() as folder:
        return sum(check(folder) for check in checks)


if __name__ == "__main__":
    sys.exit(main())
