"""A one-to-one label map: each target class reads one source logit.

    out[b, t] = logits[b, index[t]]                      NaN where index[t] is not a source

logits [B, S] float, any strides; index [T] int64; out [B, T] contiguous, in the logits' dtype.

The same launch inverts the map for the backward: readers [2, S] int32 holds the first and the last target that reads
each source (T and -1 for a source nobody reads). That is T * S comparisons in all, whatever B is, and saves a sort.

Bytes: T of S columns are read (a 32-byte sector each) and written once. No arithmetic.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch"])
def map_labels_kernel(
    logits_ptr, index_ptr, out_ptr, readers_ptr,
    batch, sources, targets,
    stride_b, stride_s,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """The first programs copy ROWS x COLUMNS outputs each; the rest find the readers of COLUMNS sources each."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(targets, COLUMNS)
    copies = tl.cdiv(batch, ROWS) * tiles
    if pid < copies:
        b = (pid // tiles * ROWS + tl.arange(0, ROWS))[:, None]
        t = (pid % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        live = (b < batch) & (t < targets)
        s = tl.load(index_ptr + t, mask=t < targets, other=-1)
        known = (s >= 0) & (s < sources)
        value = tl.load(logits_ptr + b * stride_b + s * stride_s, mask=live & known, other=0.0).to(tl.float32)
        # A source out of range spoils its own column and touches nothing else.
        value = tl.where(known, value, float("nan"))
        tl.store(out_ptr + b * targets + t, value.to(out_ptr.dtype.element_ty), mask=live)
    else:
        s = ((pid - copies) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        first = tl.full([TURN, COLUMNS], targets, tl.int32)
        last = tl.full([TURN, COLUMNS], -1, tl.int32)
        for start in range(0, targets, TURN):
            t = start + tl.arange(0, TURN)[:, None]
            reads = tl.load(index_ptr + t, mask=t < targets, other=-1) == s
            first = tl.minimum(first, tl.where(reads, t, targets))
            last = tl.maximum(last, tl.where(reads, t, -1))
        tl.store(readers_ptr + s, tl.min(first, axis=0)[None, :], mask=s < sources)
        tl.store(readers_ptr + sources + s, tl.max(last, axis=0)[None, :], mask=s < sources)


def map_labels(logits, index, readers, launch):
    """The mapped logits [B, T]; fills `readers` [2, S] unless it is empty. index is contiguous."""
    batch, sources = logits.shape
    targets = index.shape[0]
    out = torch.empty((batch, targets), dtype=logits.dtype, device=logits.device)
    programs = triton.cdiv(batch, launch.ROWS) * triton.cdiv(targets, launch.COLUMNS)
    if readers.numel():
        programs += triton.cdiv(sources, launch.COLUMNS)
    if programs:
        map_labels_kernel[(programs,)](
            logits, index, out, readers, batch, sources, targets, *logits.stride(),
            ROWS=launch.ROWS, COLUMNS=launch.COLUMNS, TURN=max(1, launch.TILE // launch.COLUMNS),
            num_warps=launch.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out
