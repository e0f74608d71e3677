"""Every Triton kernel compiles for GPUs that are not here: Triton brings the assembler, and needs no driver for it."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")
compiler = pytest.importorskip("triton.compiler")
backends = pytest.importorskip("triton.backends.compiler")

from bayeslayers.curvature.kernels import triton_draw, triton_squares, triton_step  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton interprets the kernels of this process")
TILE = {"TILE_O": 64, "TILE_I": 64}
PADDED = {"KERNEL_H": 3, "KERNEL_W": 3, "g_w": 1, "x_w": 1}
FLOATS = ("newest", "ess", "lr", "precision_lr", "curvature_weight", "damping", "clip_radius")


def sums(kernel, dtype, precision="ieee", **constants):
    types = {"g": "*" + dtype, "x": "*" + dtype, "grad": "*fp32", "squares": "*fp32"}
    tile = {**TILE, "TILE_P": 16 if dtype == "fp32" else 32}
    return kernel, types, {"WITH_GRAD": True, "PRECISION": precision, **tile, **constants}, 8


def elementwise(kernel, types, constants):
    names = ["mean", "precision", "average", "grad", "curvature", "prior_mean", "prior_precision", "spread", "sample"]
    return kernel, {**dict.fromkeys([*names, "kept"], "*fp32"), **types}, constants, 4


def draws(**flags):
    return elementwise(triton_draw.draw_kernel, {"seed": "*i64"}, {"COUNTERS": 512, **flags})


def steps(**flags):
    return elementwise(triton_step.step_kernel, dict.fromkeys(FLOATS, "fp32"), {"VALUES": 1024, **flags})


KERNELS = {
    "linear": sums(triton_squares.linear_kernel, "fp32", g_o=1, x_i=1),
    "linear-tf32": sums(triton_squares.linear_kernel, "fp32", "tf32", g_o=1, x_i=1),
    "linear-bfloat16": sums(triton_squares.linear_kernel, "bf16", g_o=1, x_i=1),
    "linear-float16": sums(triton_squares.linear_kernel, "fp16", g_p=1, x_p=1),
    "convolution": sums(triton_squares.convolution_kernel, "fp32", **PADDED),
    "convolution-tf32": sums(triton_squares.convolution_kernel, "fp32", "tf32", **PADDED),
    "convolution-bfloat16": sums(triton_squares.convolution_kernel, "bf16", KERNEL_H=1, KERNEL_W=5),
    "noise": draws(SAMPLES=False, KEEPS=True, OF_PRECISION=False),
    "sample": draws(SAMPLES=True, KEEPS=False, OF_PRECISION=False),
    "sample-and-noise": draws(SAMPLES=True, KEEPS=True, OF_PRECISION=True),
    "vogn": steps(HAS_AVERAGE=True, IS_NEW_PRECISION=False, CLIPS=True, ONE_PRIOR_MEAN=True, ONE_PRIOR_PRECISION=True),
    "ivon": steps(
        HAS_AVERAGE=True, IS_NEW_PRECISION=True, CLIPS=False, ONE_PRIOR_MEAN=False, ONE_PRIOR_PRECISION=False
    ),
}


def compiled(name, capability):
    """Return a kernel, compiled for NVIDIA GPUs of a compute capability."""
    kernel, types, constants, warps = KERNELS[name]
    signature = {key: "constexpr" if key in constants else types.get(key, "i32") for key in kernel.arg_names}
    source = compiler.ASTSource(kernel, signature, constants)
    return triton.compile(source, target=backends.GPUTarget("cuda", capability, 32), options={"num_warps": warps})


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles(name, capability):
    found = compiled(name, capability)
    assert len(found.asm["cubin"]) > 1000
    assert found.metadata.shared <= 48 * 2**10  # what a block has on every NVIDIA GPU
    if "linear" in name or "convolution" in name:
        uses_tensor_cores = "mma" in found.asm["ptx"]
        assert uses_tensor_cores == (name not in ("linear", "convolution"))  # which multiply in float32
