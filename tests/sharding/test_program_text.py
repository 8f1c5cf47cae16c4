"""What a compiled program does, read from texts as the GPU's and the TPU's compilers write them."""

import pytest

from sharding.program_text import (
    KernelCall,
    Shape,
    float_operations_of,
    instructions_of,
    kernel_calls_of,
    shapes_of,
    started_of,
)

PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,64]{1,0})->f32[8,64]{1,0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b), metadata={op_name="jit(step)/reduce_sum" stack_frame_id=2}
}

%fused_divide (p: f32[8,64], q: s32[8]) -> f32[8,64] {
  %p = f32[8,64]{1,0:T(8,128)} parameter(0)
  %q = s32[8]{0:T(256)} parameter(1)
  %add.2 = s32[8]{0:T(256)} add(%q, %q), metadata={op_name="jit(step)/add"}
  %convert.1 = f32[8]{0:T(256)} convert(%add.2)
  %maximum.1 = f32[8,64]{1,0:T(8,128)} maximum(%p, %p)
  ROOT %divide.1 = f32[8,64]{1,0:T(8,128)} divide(%maximum.1, %p), metadata={op_name="jit(step)/div"}
}

%body (s: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %s = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)S(1)}) parameter(0)
  %copy.1 = f32[8,64]{1,0} copy(%s)
}

ENTRY %main (x: f32[8,64], y: s32[8], pool: bf16[100,4,16,64]) -> f32[8,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %fusion.1 = f32[8,64]{1,0} fusion(%x, %y), kind=kLoop, calls=%fused_divide
  %c.1 = (bf16[8,2,64]{2,1,0}, /*index=1*/bf16[100,4,16,64]{3,2,1,0}) custom-call(%fusion.1, %pool), \
custom_call_target="__gpu$xla.gpu.triton", operand_layout_constraints={f32[8,64]{1,0}, bf16[100,4,16,64]{3,2,1,0}}, \
output_to_operand_aliasing={{1}: (1, {})}, metadata={op_name="jit(step)/jit(f)/chain_heads/pallas_call"}
  %w.1 = (s32[], f32[8,64]{1,0}) while(%t), condition=%condition, body=%body, metadata={op_name="jit(step)/while"}
  %c.2 = f32[8,64]{1,0:T(8,128)} custom-call(%fusion.1), custom_call_target="tpu_custom_call", \
operand_layout_constraints={f32[8,64]{1,0:T(8,128)}}, metadata={op_name="jit(step)/vmap(matmul_tpu)/pallas_call"}
  %s.1 = ((f32[8]{0}), f32[16]{0}) all-gather-start(%x), dimensions={0}
  %s.2 = f32[16]{0} all-gather-done(%s.1)
  %c.3 = (f32[8,8]{1,0}, s8[1024]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm"
  ROOT %reduce.1 = f32[8]{0} reduce(%x, %zero), dimensions={1}, to_apply=%sum
}
"""
INSTRUCTIONS = tuple(instructions_of(PROGRAM))


def test_kernels_and_their_arrays():
    pool, rows = Shape("bf16", (100, 4, 16, 64)), Shape("f32", (8, 64))
    heads, product = kernel_calls_of(INSTRUCTIONS)
    assert heads == KernelCall("chain_heads", (rows, pool), (Shape("bf16", (8, 2, 64)), pool))
    assert product == KernelCall("matmul_tpu", (rows,), (rows,))
    assert product.num_bytes() == 2 * 8 * 64 * 4
    assert heads.num_bytes({pool.num_bytes}) == 8 * 64 * 4 + 8 * 2 * 64 * 2


def test_float_arithmetic_is_what_can_round():
    """The reduction's addition, the division and the library's product; no maximum, convert or sum of integers."""
    found = float_operations_of(INSTRUCTIONS)
    assert [operation.kind for operation in found] == ["add", "divide", "custom-call"]
    assert [operation.source for operation in found] == ["jit(step)/reduce_sum", "jit(step)/div", ""]


def test_what_is_started_stands_in_no_fusion():
    kinds = [instruction.kind for instruction in started_of(INSTRUCTIONS)]
    assert kinds == ["copy", "fusion", "custom-call", "custom-call", "all-gather-start", "custom-call", "reduce"]


@pytest.mark.parametrize(
    ("text", "num_bytes", "is_float"),
    [
        ("pred[3]{0}", 3, False),
        ("s4[6]", 3, False),
        ("f8e4m3fn[2,5]", 10, True),
        ("bf16[]", 2, True),
        ("u64[2]", 16, False),
    ],
)
def test_a_shape(text, num_bytes, is_float):
    (shape,) = shapes_of(text)
    assert (shape.num_bytes, shape.is_float) == (num_bytes, is_float)
