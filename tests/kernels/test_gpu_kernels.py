"""Reading what NVIDIA's assembler says of kernels, and what in their PTX is about bits."""

from sharding.gpu_kernels import GpuKernel, kernels_of, parse

SAID = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'chain_product__1' for 'sm_90a'
ptxas info    : Function properties for chain_product__1
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 38 registers, used 1 barriers, 64 bytes smem
ptxas info    : Compile time = 10.361 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'draw' for 'sm_90a'
ptxas info    : Function properties for draw
    408 bytes stack frame, 404 bytes spill stores, 412 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""
PTX = """
.target sm_90a
.visible .entry chain_product__1(
	.param .u64 .ptr .global .align 1 chain_product__1_param_0
)
{
	add.rn.f32 	%r1, %r2, %r3;
	mul.rn.bf16x2 	%r1, %r2, %r3;
	add.s32 	%r1, %r2, %r3;
	mad.lo.s32 	%r1, %r2, %r3, %r4;
	atom.global.gpu.acq_rel.add.s32 	%r1, [%rd1], %r2;
	redux.sync.add.s32 	%r1, %r2, %r3;
}
	// .globl	draw
.visible .entry draw(
	.param .u64 draw_param_0
)
{
	mov.u32 %r1, 0x0; @%p1 atom.global.gpu.acq_rel.add.f32 %r1, [ %rd2 + 0 ], %r2;
	red.global.add.noftz.bf16x2 	[%rd1], %r2;
	atom.global.v4.f32.add 	{%r1, %r2, %r3, %r4}, [%rd1], {%r1, %r2, %r3, %r4};
	atom.global.cas.b32 	%r1, [%rd1], %r2, %r3;
	@!%p1 fma.rn.f32 	%r1, %r2, %r3, %r4;
	fma.rn.ftz.f32 	%r1, %r2, %r3, %r4;
	add.f32 	%r1, %r2, %r3;
	mul.ftz.f32 	%r1, %r2, %r3;
}
"""


def test_kernels():
    product, draw = parse(SAID, PTX)
    assert product == GpuKernel("chain_product__1", 38, 0, 64, float_atomics=0, fused=0, unpinned=0)
    assert draw == GpuKernel("draw", 255, 404, 0, float_atomics=4, fused=2, unpinned=2)


def test_a_program_without_kernels_needs_no_assembler():
    assert kernels_of([]) == ()
