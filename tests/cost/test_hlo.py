"""Reading a compiled program's text, and what its instructions do, against programs whose work is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.cost import hlo, parts, work
from jaxtune.cost.collectives import read, starts


def compiled(function, *shapes, **options) -> hlo.Module:
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) if isinstance(shape, tuple) else shape for shape in shapes]
    return hlo.parse(jax.jit(function, **options).lower(*args).compile().as_text())


def flops(module: hlo.Module, name: str = '') -> float:
    """FLOPs of all products in a program, loops counted."""
    computation, total = module.computations[name or module.entry], 0.0
    for one in computation.values():
        if one.opcode == 'while':
            total += module.trips(one) * flops(module, one.attribute(r'body=%?([\w.\-]+)'))
        elif one.opcode == 'call':
            total += flops(module, one.called[0])
        else:
            total += sum(work.products(module, computation, one).values())
    return total


@pytest.mark.parametrize('length', [3, 17])
def test_products_in_a_loop_count_as_often_as_it_runs(length):
    def chain(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    module = compiled(chain, (24, 40), (length, 40, 40))
    assert flops(module) == 2 * length * 24 * 40 * 40


def test_products_of_every_form():
    def function(x, y, z):
        batched = jnp.einsum('bij,bjk->bik', x, y)
        return jnp.einsum('bik,kl->bil', batched, z).sum() + jnp.einsum('bij,bij->', x, x)

    module = compiled(function, (3, 5, 7), (3, 7, 11), (11, 13))
    least = 2 * 3 * 5 * 7 * 11 + 2 * 3 * 5 * 11 * 13
    assert least <= flops(module) <= least + 2 * 3 * 5 * 7


def test_a_slice_of_a_stack_reads_the_slice_and_an_update_in_place_writes_it():
    def function(stack, x):
        def body(i, stack):
            return jax.lax.dynamic_update_index_in_dim(stack, jnp.sin(stack[i] + x), i, 0)

        return jax.lax.fori_loop(0, 64, body, stack)

    module = compiled(function, (64, 4096), (4096,), donate_argnums=0)
    (loop,) = [one for one in module.computations[module.entry].values() if one.opcode == 'while']
    assert module.trips(loop) == 64
    body = module.computations[loop.attribute(r'body=%?([\w.\-]+)')]
    moved = sum(work.moved_bytes(module, body, one) for one in body.values() if one.opcode == 'fusion')
    assert 3 * 4096 * 4 <= moved <= 6 * 4096 * 4  # not the stack, which is 64 times as large


def test_a_program_that_is_not_one_has_nothing():
    assert hlo.parse('').computations == {}
    assert hlo.parse('out of luck {\n}\n').entry == ''


def test_metadata_over_several_lines_ends_no_computation():
    text = (
        'HloModule m\n\n'
        'ENTRY %main (p: f32[8]) -> f32[8] {\n'
        '  %p = f32[8]{0} parameter(0)\n'
        '  %k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={metadata={\n'
        '"a": 1\n'
        '}}, metadata={op_name="jit(f)/kernel/call"}\n'
        '  ROOT %n = f32[8]{0} negate(%k)\n'
        '}\n'
    )
    module = hlo.parse(text)
    assert list(module.computations['main']) == ['p', 'k', 'n']
    assert module.computations['main']['k'].op_name == 'jit(f)/kernel/call'
    assert module.computations['main']['n'].root


def collectives(module: hlo.Module, mesh):
    found = []
    for computation in module.computations.values():
        found += [read(computation, one, mesh) for one in computation.values() if starts(one)]
    return found


def test_collectives_know_their_axes_and_what_a_device_sends():
    sizes = {'data': 2, 'fsdp': 4}
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def body(x):
        gathered = jax.lax.all_gather(x, 'fsdp', tiled=True)
        summed = jax.lax.psum(gathered, 'data')
        return jax.lax.psum_scatter(summed, 'fsdp', tiled=True), jax.lax.psum(x.sum(), ('data', 'fsdp'))

    shape = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, P(('data', 'fsdp'))))
    function = jax.shard_map(body, mesh=mesh, in_specs=P(('data', 'fsdp')), out_specs=(P(('data', 'fsdp')), P()))
    found = {(one.kind, one.axes): one.nbytes for one in collectives(compiled(function, shape), sizes)}
    rows = 64 * 128 * 4 // 8  # of a device
    assert found['all-gather', 'fsdp'] == 3 * rows
    assert found['all-reduce', 'data'] == 4 * rows  # twice a half of the gathered rows
    assert found['reduce-scatter', 'fsdp'] == 3 * rows
    assert found['all-reduce', 'data+fsdp'] == 4 * 2 * 7 / 8


@pytest.mark.parametrize(
    ('groups', 'axes'),
    [
        ('{{0,1,2,3},{4,5,6,7}}', 'fsdp+tensor'),
        ('{{0,2},{1,3},{4,6},{5,7}}', 'fsdp'),
        ('[4,2]<=[8]', 'tensor'),
        ('[4,2]<=[2,4]T(1,0)', 'data'),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", 'data+tensor'),
        ('{}', 'data+fsdp+tensor'),
    ],
)
def test_groups_of_devices_in_all_forms(groups, axes):
    line = f'  %x = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add'
    module = hlo.parse('ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n' + line + '\n}\n')
    (found,) = collectives(module, {'data': 2, 'fsdp': 2, 'tensor': 2})
    assert found.axes == axes


def test_a_permutation_sends_what_it_holds():
    line = '  %x = f32[8]{0} collective-permute(%p), source_target_pairs={{0,2},{2,0},{1,3},{3,1}}'
    module = hlo.parse('ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n' + line + '\n}\n')
    (found,) = collectives(module, {'data': 2, 'fsdp': 2})
    assert (found.kind, found.axes, found.nbytes) == ('collective-permute', 'data', 32)


@pytest.mark.parametrize(
    ('path', 'expected'),
    [
        ('jit(train_step)/jvp(Decoder)/Decoder._scan_layers/while/body/closed_call/Block/mlp/up_proj/dot_general',
         ('layers/mlp/up_proj', 'forward')),
        ('jit(train_step)/transpose(jvp(Decoder))/Decoder._scan_layers/while/body/closed_call/checkpoint/'
         'rematted_computation/Block/self_attn/self_attn.project/q_proj/dot_general',
         ('layers/self_attn/q_proj', 'recomputed')),
        ('jit(train_step)/transpose(jvp(Decoder))/Decoder._scan_layers/while/body/closed_call/checkpoint/Block/mlp/mul',
         ('layers/mlp', 'backward')),
        ('jit(train_step)/jvp(vocabulary)/shard_map/while/body/closed_call/dot_general', ('vocabulary', 'forward')),
        ('jit(train_step)/transpose(jvp(Decoder))/Decoder._scan_layers/while/body/closed_call/checkpoint/Block/self_attn/'
         'flash_keys/pallas_call', ('layers/self_attn', 'backward')),
        ('jit(train_step)/optimizer/jit(_where)/select_n', ('optimizer', 'update')),
        ('jit(train_step)/jvp(Decoder)/Decoder._scan_layers/while/body/dynamic_slice', ('layers', 'forward')),
        ('', ('other', 'update')),
    ],
)  # fmt: skip
def test_parts_of_the_model_by_path(path, expected):
    assert parts.of(path) == expected


def test_bytes_of_types():
    one, two = hlo.arrays('(bf16[2,3]{1,0:T(8,128)(2,1)}, f8e4m3fn[4]{0})')
    assert (one.nbytes, two.nbytes, str(one)) == (12, 4, 'bf16[2,3]')
    assert hlo.arrays('pred[3]{0}')[0].nbytes == 3
    assert hlo.arrays('s4[8]{0}')[0].nbytes == 4
    assert np.prod(hlo.arrays('f32[]')[0].dims) == 1
