"""The barrier among the programs of a group: those that share a tile of the batch (in heads also the head), each with
its own hidden units.

At the end of a step a program stores its tile of h, or of the gate gradients, in global memory and arrives. At the next
step it waits until all programs of its group have arrived. Between the two it loads the tensors that do not depend on
the other programs.

- Launch with `launch_cooperative_grid=True`: all programs must run at once, or a wait never ends.
- The counters only grow, so no program resets one that another may still read. They are zero before each launch.
- Every wait is bounded. Past the bound the program marks its group's counter as stuck, for the others of the group, and
  sets `timeout_flag_ptr`, for the host. It goes on without waiting; from then on it computes NaN, and so does every
  program that uses its results.

The two functions are in assembly, because a Triton `while` around a scalar atomic takes two barriers and a broadcast
per poll. The memory model is that of the PTX manual, "Memory consistency model": the CTA barrier and the release make
all stores of the program visible to the thread that acquires the counter; the CTA barrier after it makes them visible
to all threads of that program. The L1 cache is not coherent, so exchanged data is loaded with `.cg`.
"""

import triton
import triton.language as tl

LINE = tl.constexpr(32)  # counters lie this many int32 apart, a cache line each
# A poll takes at least a round trip to L2, some 0.3 us, so this is about five seconds. A step takes microseconds.
MOST_POLLS = tl.constexpr(1 << 24)
STUCK = tl.constexpr(1 << 30)  # more than there are arrivals

ARRIVE = tl.constexpr("""
{
    .reg .pred one;
    .reg .u32 thread;
    bar.sync 0;
    mov.u32 thread, %tid.x;
    setp.eq.u32 one, thread, 0;
    @one red.release.gpu.global.add.u32 [$1], 1;
    mov.u32 $0, 0;
}
""")

WAIT = tl.constexpr("""
{
    .reg .pred lost, other, done, more;
    .reg .u32 thread, count, polls;
    mov.u32 thread, %tid.x;
    setp.ne.u32 lost, thread, thread;
    setp.ne.u32 other, thread, 0;
    @other bra TOGETHER;
    mov.u32 polls, 0;
POLL:
    ld.acquire.gpu.global.u32 count, [$1];
    setp.ge.u32 done, count, $2;
    @done bra SEEN;
    add.u32 polls, polls, 1;
    setp.lt.u32 more, polls, $4;
    @more bra POLL;
    red.relaxed.gpu.global.or.b32 [$1], $5;
    st.relaxed.sys.global.u32 [$3], 1;
    mov.u32 count, $5;
SEEN:
    setp.ge.u32 lost, count, $5;
TOGETHER:
    bar.red.or.pred lost, 0, lost;
    selp.u32 $0, 0, 1, lost;
}
""")


@triton.jit
def counter_of(direction, head, GROUPS: tl.constexpr):
    """The place of this program's counter among those `[D, tiles of B, GROUPS, LINE]`: each head has a group, or all
    heads are one."""
    group = (direction * tl.num_programs(0) + tl.program_id(0)) * GROUPS
    if GROUPS > 1:
        group += head
    return group * LINE


@triton.jit
def arrive(arrived_ptr):
    """Makes all stores of this program visible to the programs that `wait` for it. No-op without a counter."""
    if arrived_ptr is not None:
        tl.inline_asm_elementwise(ARRIVE, "=r,l,~{memory}", [arrived_ptr], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait(arrived_ptr, arrivals, timeout_flag_ptr):
    """Waits until `arrivals` programs have arrived. Returns whether they did; None without a counter.

    Their stores may be loaded after it, and not before.
    """
    alive = None
    if arrived_ptr is not None:
        alive = (
            tl.inline_asm_elementwise(
                WAIT, "=r,l,r,l,r,r,~{memory}", [arrived_ptr, arrivals, timeout_flag_ptr, MOST_POLLS, STUCK],
                dtype=tl.int32, is_pure=False, pack=1,
            ) != 0
        )  # fmt: skip
    return alive


@triton.jit
def unless_stuck(alive, tiles, COUNT: tl.constexpr):
    """The tiles; NaN if `alive`, from `wait`, is false."""
    result = tiles
    if alive is not None:
        result = ()
        for k in tl.static_range(COUNT):
            result = result + (tl.where(alive, tiles[k], float("nan")),)
    return result
