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
# Numbers that Triton takes for constants where they are 1, as it does with strides, and for multiples of 16.
ONES = "groups o c g_height g_width g_c g_h g_w x_c x_h x_w KERNEL_H KERNEL_W".split()
ONES += "stride_h stride_w padding_h padding_w dilation_h dilation_w".split()
EVEN = {"p", "o", "i", "g_n", "g_p", "x_n", "x_p", "x_c", "x_h", "size"}
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
    "linear-ones": sums(triton_squares.linear_kernel, "fp32", **dict.fromkeys("oi", 1), g_p=1, x_p=1),
    "convolution-ones": sums(triton_squares.convolution_kernel, "fp32", **dict.fromkeys(ONES, 1)),
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
    even = [i for i, (key, kind) in enumerate(signature.items()) if kind[0] == "*" or (key in EVEN and kind == "i32")]
    source = compiler.ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in even})
    return triton.compile(source, target=backends.GPUTarget("cuda", capability, 32), options={"num_warps": warps})


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles(name, capability):
    found = compiled(name, capability)
    assert len(found.asm["cubin"]) > 1000
    assert found.metadata.shared <= 48 * 2**10  # what a block has on every NVIDIA GPU
    precision = KERNELS[name][2].get("PRECISION")
    if precision is not None:
        exact = precision == "ieee" and KERNELS[name][1]["x"] == "*fp32"
        assert ("mma" in found.asm["ptx"]) != exact  # tensor cores have no exact products of float32 values
