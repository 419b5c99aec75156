"""Seconds of programs: the roofline by hand, the TPU compiler's cycles, kernels by their shapes."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxtune.cost import Chip, chip_of, estimate, hlo, kernels, work

CHIP = Chip('test', 'cuda', peak=1e12, bandwidth=1e9, link=1e8)


def program(*lines: str, others: str = '') -> hlo.Module:
    return hlo.parse(
        others + 'ENTRY %main (p: f32[1]) -> f32[1] {\n' + ''.join(f'  {line}\n' for line in lines) + '}\n'
    )


def test_an_instruction_takes_what_its_products_or_its_bytes_need():
    module = program(
        '%a = bf16[1000,2000]{1,0} parameter(0)',
        '%b = bf16[2000,500]{1,0} parameter(1)',
        '%c = bf16[1000,500]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}',
        'ROOT %d = bf16[1000,500]{1,0} negate(%c)',
    )
    moved = 2 * (1000 * 2000 + 2000 * 500 + 1000 * 500)
    slow = estimate(module, CHIP, {'data': 1})
    assert slow.seconds == pytest.approx(moved / 1e9 + 2e6 / 1e9)
    fast = estimate(module, dataclasses.replace(CHIP, bandwidth=1e15), {'data': 1})
    assert fast.seconds == pytest.approx(2 * 1000 * 2000 * 500 / 1e12, rel=1e-3)
    launched = estimate(module, dataclasses.replace(CHIP, launch=1.0), {'data': 1})
    assert launched.seconds == pytest.approx(2 + slow.seconds)


def test_hidden_collectives_take_time_only_where_work_is_shorter():
    gather = 'replica_groups={{0,1}}, dimensions={0}'
    lines = [
        '%a = f32[1000]{0} parameter(0)',
        f'%s = (f32[1000]{{0}}, f32[2000]{{0}}) all-gather-start(%a), {gather}',
        '%w = f32[1000000]{0} iota(), iota_dimension=0',
        '%n = f32[1000000]{0} negate(%w)',
        '%d = f32[2000]{0} all-gather-done(%s)',
    ]
    quick = estimate(program(*lines), CHIP, {'data': 2})
    assert quick.hidden_seconds == pytest.approx(4000 / 1e8)
    assert quick.blocking_seconds == 0
    assert quick.seconds == pytest.approx(8e6 / 1e9)
    long = estimate(program(*lines), dataclasses.replace(CHIP, link=1e5), {'data': 2})
    assert long.seconds == pytest.approx(4000 / 1e5)
    waiting = estimate(program(lines[0], f'%s = f32[2000]{{0}} all-gather(%a), {gather}'), CHIP, {'data': 2})
    assert waiting.seconds == waiting.blocking_seconds == pytest.approx(4000 / 1e8)
    (one,) = waiting.collectives
    assert (one.kind, one.axes, one.count, one.hidden, one.largest) == ('all-gather', 'data', 1, False, 'f32[2000]')


def test_cycles_of_a_tpu_are_added_up_loop_by_loop():
    others = (
        '%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {\n'
        '  %p = (s32[], f32[8]{0}) parameter(0)\n'
        '  %i = s32[] get-tuple-element(%p), index=0\n'
        '  %x = f32[8]{0} get-tuple-element(%p), index=1\n'
        '  %one = s32[] constant(2)\n'
        '  %next = s32[] add(%i, %one)\n'
        '  %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%f, '
        'metadata={op_name="jit(f)/jvp(M)/M._scan_layers/while/mul"}, backend_config={"estimated_cycles":"1000"}\n'
        '  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %y)\n'
        '}\n'
        '%cond (p: (s32[], f32[8])) -> pred[] {\n'
        '  %p = (s32[], f32[8]{0}) parameter(0)\n'
        '  %i = s32[] get-tuple-element(%p), index=0\n'
        '  %n = s32[] constant(15)\n'
        '  ROOT %less = pred[] compare(%i, %n), direction=LT\n'
        '}\n'
    )
    module = program(
        '%a = (s32[], f32[8]{0}) parameter(0)',
        '%w = (s32[], f32[8]{0}) while(%a), condition=%cond, body=%body',
        'ROOT %c = f32[8]{0} copy(%w), backend_config={"estimated_cycles":"500"}',
        others=others,
    )
    chip = Chip('test', 'tpu', 1e12, 1e9, 1e8, clock=1e6)
    found = estimate(module, chip, {'data': 1})
    assert found.seconds == pytest.approx((8 * 1000 + 500) / 1e6)
    assert found.parts == {('layers', 'forward'): pytest.approx(8e-3), ('other', 'update'): pytest.approx(5e-4)}
    assert estimate(program('%a = f32[8]{0} parameter(0)'), chip, {'data': 1}) is None


def of(line: str, *operands: str, attended: float = 0.5) -> kernels.Work | None:
    module = program(*operands, line)
    computation = module.computations['main']
    call = list(computation.values())[-1]
    return kernels.work(call, work.operand_arrays(computation, call), kernels.Shares(attended, routed=0.25))


def test_kernels_by_their_shapes():
    masks, heads = '%m = s8[1,4,4]{2,1,0} parameter(0)', '%q = bf16[8,512,128]{2,1,0} parameter(1)'
    target = 'custom_call_target="tpu_custom_call"'
    pairs, shape = 8 * 512 * 512 * 128, 'bf16[8,512,128]{2,1,0}'
    call = f'custom-call(%m, %q, %q, %q), {target}'
    forward = of(f'%splash_mha_fwd_residuals.3 = ({shape}, f32[8,512]) {call}', masks, heads)
    assert forward.flops == 2 * 2 * pairs * 0.5
    dq = of(f'%splash_mha_dq_no_residuals = ({shape}) {call}', masks, heads, attended=1.0)
    assert dq.flops == 2 * 3 * pairs
    dkv = of(f'%splash_mha_dkv_no_residuals = ({shape}, {shape}) {call}', masks, heads)
    assert dkv.flops == 2 * 4 * pairs * 0.5
    partial = 'bf16[2,8,512,128]{3,2,1,0}'
    dkv = of(f'%splash_mha_dkv_no_residuals = ({partial}, {shape}, {shape}) {call}', masks, heads)
    assert dkv.flops == 2 * 5 * pairs * 0.5
    told, ids = '%t = s32[2]{0} parameter(0)', '%i = s32[2,512]{1,0} parameter(1)'
    rows, shared = '%q = bf16[2,512,4,128]{3,2,1,0} parameter(2)', '%k = bf16[2,512,2,128]{3,2,1,0} parameter(3)'
    call = (
        'custom-call(%t, %i, %q, %k, %k), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/NAME"}'
    )
    for name, products in (
        ('self_attn/flash_forward/pallas_call', 2),
        ('transpose(jvp(flash_keys))/pallas_call', 4),
        ('transpose(jvp(flash_queries))/pallas_call', 3),
    ):
        line = f'%pallas_call.7 = bf16[2,512,4,128]{{3,2,1,0}} {call.replace("NAME", name)}'
        assert of(line, told, ids, rows, shared).flops == 2 * products * (2 * 4 * 512 * 512 * 128) * 0.5
    rows, stack = '%x = bf16[4096,256]{1,0} parameter(0)', '%k = bf16[8,256,384]{2,1,0} parameter(1)'
    product = of(f'%gmm.7 = bf16[4096,384]{{1,0}} custom-call(%x, %k), {target}', rows, stack)
    assert product.flops == 2 * 4096 * 256 * 384 / 4
    rows, turned = '%x = bf16[256,4096]{1,0} parameter(0)', '%y = bf16[4096,384]{1,0} parameter(1)'
    product = of(f'%tgmm.7 = f32[8,256,384]{{2,1,0}} custom-call(%x, %y), {target}', rows, turned)
    assert product.flops == 2 * 4096 * 256 * 384 / 4
    assert of(f'%mine.7 = bf16[4096,384]{{1,0}} custom-call(%x), {target}', rows) is None


@pytest.mark.parametrize(
    ('kind', 'platform', 'peak', 'clock'),
    [
        ('TPU v5 lite', 'tpu', 197e12, 1.5e9),
        ('TPU v5', 'tpu', 459e12, 1.75e9),
        ('TPU v6 lite', 'tpu', 918e12, 1.75e9),
        ('TPU v4', 'tpu', 275e12 / 2, 1.05e9),
        ('NVIDIA H100 80GB HBM3', 'cuda', 989e12, 0.0),
    ],
)
def test_chips_by_name(kind, platform, peak, clock):
    chip = chip_of(SimpleNamespace(device_kind=kind, platform=platform))
    assert (chip.peak, chip.clock) == (peak, clock)
    assert chip.product_seconds(1e12, 'bf16') == pytest.approx(1e12 / chip.peak / chip.product_share)
    speed = 1 if kind == 'TPU v4' else 2  # which is as fast in eight bits as in sixteen
    assert chip.product_seconds(1e12, 's8') == chip.product_seconds(1e12, 'bf16') / speed
    speed = 2 if platform == 'cuda' else 1
    assert chip.product_seconds(1e12, 'f8e4m3fn') == chip.product_seconds(1e12, 'bf16') / speed


def test_a_chip_that_is_not_known_is_none():
    assert chip_of(SimpleNamespace(device_kind='AMD Instinct MI300X', platform='rocm')) is None


def test_this_machine_s_own_chip_is_measured_and_longer_programs_take_longer():
    chip = chip_of(jax.devices('cpu')[0])
    assert chip.peak > 1e9 < chip.bandwidth

    def seconds(length: int) -> float:
        def chain(x, kernels):
            return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

        shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 256), (length, 256, 256)))
        return estimate(hlo.parse(jax.jit(chain).lower(*shapes).compile().as_text()), chip, {'data': 1}).seconds

    assert seconds(64) == pytest.approx(8 * seconds(8), rel=0.1)
