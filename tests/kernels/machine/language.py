"""Stand-ins for what the kernels import of Gluon."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .memory import Barrier, Barriers, Block, Descriptor, Pointer, Shared, block
from .scheduler import Fault, here, pause

WARPS = {"consumers": 4}


def _copy_in(source: Descriptor, coord: list[Any], barrier: Barrier, result: Shared) -> None:
    """A TMA load: zeros outside of the matrix, and all of the block's bytes counted."""
    task, (height, width), (row, column) = here(), source.block, map(int, coord)
    if result.shape != [height, width]:
        raise Fault(f"a block {source.block} into a buffer of {result.shape}")
    if task.must_fence:
        raise Fault(f"{task.name} copies what it was told of, without a fence")
    result.data.fill_(float("nan"))

    def land() -> None:
        part = source.matrix[row : row + height, column : column + width]
        if source.hidden[row : row + height, column : column + width].any():
            raise Fault("a copy of what was written without a fence")
        result.data.zero_()
        result.data[: part.shape[0], : part.shape[1]] = part
        result.hidden.fill_(False)
        barrier.land(height * width * source.matrix.element_size())

    task.scheduler.later.append(land)
    pause()


def _copy_out(target: Descriptor, coord: list[Any], source: Shared) -> None:
    """A TMA store, clipped at the matrix' edges."""
    task, (row, column), copy = here(), map(int, coord), SimpleNamespace(done=False)
    height, width = source.shape
    source.seen()

    def land() -> None:
        part = target.matrix[row : row + height, column : column + width]
        part.copy_(source.data[: part.shape[0], : part.shape[1]])
        copy.done = True

    task.copies.append(copy)
    task.scheduler.later.append(land)
    pause()


def _store_wait(pending: int) -> None:
    """Until all copies but the `pending` latest have been read."""
    older = here().copies[: len(here().copies) - pending]
    pause(lambda: all(copy.done for copy in older), "its copies")


class Sum:
    """An accumulator, of which products may be under way."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.open = value, 0


class Product:
    def __init__(self, left: Any, right: Any, total: Sum) -> None:
        self.left, self.right, self.total, self.ended = left, right, total, False
        total.open += 1

    def end(self) -> None:
        if not self.ended:
            self.total.value = self.total.value + _read(self.left) @ _read(self.right)
            self.total.open -= 1
            self.ended = True


def _read(operand: Any) -> Tensor:
    return (operand.seen() if isinstance(operand, Shared) else operand).float()


def _init(value: Any) -> Sum:
    return value if isinstance(value, Sum) else Sum(value)


def _multiply(left: Any, right: Any, total: Any, *, is_async: bool = False) -> Any:
    task, total = here(), _init(total)
    product = Product(left, right, total)
    task.products.append(product)
    if task.scheduler.random.random() < 0.3:  # they end in their order
        for each in task.products:
            each.end()
    pause()
    return total if is_async else _wait(0, deps=(total,))


def _wait(outstanding: int = 0, deps: tuple[Any, ...] = ()) -> Any:
    products = here().products
    while len(products) > outstanding:
        products.pop(0).end()
    ended = [each.value if isinstance(each, Sum) and not each.open else each for each in deps]
    return ended[0] if len(ended) == 1 else tuple(ended)


def _fence_shared() -> None:
    task = here()
    for hidden, _ in task.unfenced:
        if _ is None:
            hidden.fill_(False)
    task.unfenced = [each for each in task.unfenced if each[1] is not None]


def _fence_global(*_: Any, **__: Any) -> None:
    """The kernels' only inline assembly."""
    task = here()
    for hidden, at in task.unfenced:
        if at is not None:
            hidden[at] = False
    task.unfenced = [each for each in task.unfenced if each[1] is None]
    task.must_fence = False


def _places(pointer: Pointer, mask: Any) -> tuple[Tensor, Tensor]:
    at = torch.as_tensor(pointer.at)
    wanted = torch.ones((), dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    at, wanted = torch.broadcast_tensors(at, wanted)
    if (wanted & ((at < 0) | (at >= pointer.memory.flat.numel()))).any():
        raise Fault(f"{here().name} reaches outside of a tensor")
    return at, wanted


def _load(pointer: Pointer, mask: Any = None, other: float = 0) -> Block:
    pause()
    at, wanted = _places(pointer, mask)
    found = pointer.memory.flat[torch.where(wanted, at, 0)]
    return block(torch.where(wanted, found, torch.as_tensor(other, dtype=found.dtype)))


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    """Not all at once: others may look in between."""
    task = here()
    at, wanted = _places(pointer, mask)
    values = torch.broadcast_to(torch.as_tensor(value), at.shape)[wanted]
    places, memory = at[wanted], pointer.memory
    task.unordered = True
    for half in (slice(0, None, 2), slice(1, None, 2)):
        memory.flat[places[half]] = values[half].to(memory.flat.dtype)
        memory.hidden[places[half]] = True
        task.unfenced.append((memory.hidden, places[half]))
        pause()


def _atomic_add(pointer: Pointer, value: int, sem: str, scope: str) -> int:
    task, memory, at = here(), pointer.memory, int(pointer.at)
    if value == 0:  # a spin
        task.scheduler.polls += 1
        task.pause()
    else:
        pause()
    if "rel" in sem and sem != "relaxed" and task.unordered:
        raise Fault(f"{task.name} announces what not all of its threads have written")
    before = int(memory.flat[at])
    memory.flat[at] += value
    if sem == "acquire":
        task.must_fence = True
    return before


def _barrier() -> None:
    here().unordered = False
    pause()


def _where(condition: Any, yes: Any, no: Any) -> Any:
    if not isinstance(condition, Tensor):
        return yes if condition else no
    return torch.where(condition, yes, no)


def _largest(values: Block, axis: int) -> Any:
    found = values.amax(axis)
    return int(found) if found.ndim == 0 else found


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if dtype == torch.int64:
        return Barriers(shape[0])
    full = torch.zeros if dtype == torch.int32 else torch.empty
    data = full(shape, dtype=dtype)
    if dtype != torch.int32:
        data.fill_(float("nan"))
    return Shared(data, torch.zeros(shape, dtype=torch.bool))


def _specialize(parts: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
    mine = here()
    tasks = [
        mine.scheduler.spawn(
            f"{body.__name__.strip('_')}r of program {mine.program}",
            mine.program,
            lambda body=body, given=given: body(*given),
        )
        for body, given in parts
    ]
    pause(lambda: all(task.done for task in tasks), "its partitions")


def _ignored(*_: Any, **__: Any) -> None:
    """A layout."""


def _blocked(*sides: Any) -> SimpleNamespace:
    names = "size_per_thread", "threads_per_warp", "warps_per_cta", "order"
    return SimpleNamespace(**dict(zip(names, sides, strict=True)))


def _expect(barrier: Barrier, size: int) -> None:
    barrier.arrive(1, size)
    pause()


def _arrive(barrier: Barrier, *, count: int, pred: Any = True) -> None:
    pause()
    if pred:
        barrier.arrive(count)


gl = SimpleNamespace(
    bfloat16=torch.bfloat16,
    float16=torch.float16,
    float32=torch.float32,
    int32=torch.int32,
    int64=torch.int64,
    constexpr=lambda value: value,
    NVMMADistributedLayout=_ignored,
    DotOperandLayout=_ignored,
    SliceLayout=_ignored,
    BlockedLayout=_blocked,
    num_warps=lambda: WARPS["consumers"],
    program_id=lambda axis: here().program,
    num_programs=lambda axis: here().scheduler.programs,
    where=_where,
    zeros=lambda shape, dtype, layout=None: block(torch.zeros(tuple(shape), dtype=dtype)),
    full=lambda shape, value, dtype, layout=None: block(torch.full(shape, value, dtype=dtype)),
    arange=lambda start, end, layout=None: block(torch.arange(start, end)),
    cdiv=lambda a, b: -(-a // b),
    static_range=range,
    exp=torch.exp,
    maximum=torch.maximum,
    sum=lambda values, axis: values.sum(axis),
    max=_largest,
    reshape=lambda values, shape: values.reshape(shape),
    permute=lambda values, order: values.permute(order),
    split=lambda values: (values[..., 0], values[..., 1]),
    expand_dims=lambda values, axis: values.unsqueeze(axis),
    convert_layout=lambda values, layout: values,
    inline_asm_elementwise=_fence_global,
    barrier=_barrier,
    allocate_shared_memory=_allocate,
    load=_load,
    store=_store,
    atomic_add=_atomic_add,
    warp_specialize=_specialize,
)
hopper = SimpleNamespace(
    tma=SimpleNamespace(
        async_copy_global_to_shared=_copy_in,
        async_copy_shared_to_global=_copy_out,
        store_wait=_store_wait,
    ),
    mbarrier=SimpleNamespace(
        MBarrierLayout=_ignored,
        init=lambda barrier, count: barrier.begin(count),
        wait=lambda barrier, parity: pause(lambda: barrier.has_passed(int(parity)), "a slot"),
        expect=_expect,
        arrive=_arrive,
    ),
    warpgroup_mma=_multiply,
    warpgroup_mma_init=_init,
    warpgroup_mma_wait=_wait,
    fence_async_shared=_fence_shared,
)


def _jit(function: Any = None, **_: Any) -> Any:
    return function if function is not None else lambda function: function


gluon = SimpleNamespace(jit=_jit, constexpr_function=_jit, language=gl)
