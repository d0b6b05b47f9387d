"""One gather from two tables: the frozen vocabulary and the soft tokens.

    out[b, t] = scale * row + positions[t],   row = vocab[id]          id = ids[b, t] >= 0
                                                    soft[n, -1 - id]   id < 0, n = index[b] (0, or b, without an index)
    out[b, t] = 0                             id = PADDING, index[b] = -1, or a slot from lengths[n] on
    out[b, t] = NaN                           anything else

ids [B, T] int64; vocab [V, d]; soft [N, P, d]; index [B], lengths [N] int64; positions [T or more, d]; any strides; the
three tables may differ in dtype. out [B, T, d] contiguous; computed in float32, rounded once.

Bytes: every row that is read, once; B * T * d written once; 8 bytes an id. At B=8, T=2176, d=4096, bf16: 143 MB + 143 MB.
FLOPs: two an element.
"""

import torch
import triton
import triton.language as tl

from .._shared import rounded


@triton.jit(do_not_specialize=["rows", "length", "words", "prompts", "slots"])
def soft_gather_kernel(
    ids_ptr, vocab_ptr, soft_ptr, index_ptr, lengths_ptr, positions_ptr, out_ptr,
    rows, length, words, prompts, slots,
    stride_ids_b, stride_ids_t, stride_vocab_v, stride_vocab_d, stride_soft_n, stride_soft_p, stride_soft_d,
    stride_index, stride_lengths, stride_positions_t, stride_positions_d,
    scale,
    OWN: tl.constexpr, PADDING: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens and COLUMNS of their width. A row that is not asked for is masked off, so it is not fetched."""
    pid = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    row = pid // tiles * ROWS + tl.arange(0, ROWS)
    column = (pid % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    live = row < rows
    b = row // length
    t = row % length
    token = tl.load(ids_ptr + b * stride_ids_b + t * stride_ids_t, mask=live, other=PADDING)
    is_word = (token >= 0) & (token < words)
    slot = -1 - token
    is_slot = (token < 0) & (slot < slots)
    if index_ptr is not None:
        n = tl.load(index_ptr + b * stride_index, mask=is_slot, other=-1)
    elif OWN:
        n = b
    else:
        n = tl.zeros_like(b)
    chosen = is_slot & (n >= 0) & (n < prompts)
    if lengths_ptr is not None:
        is_soft = chosen & (slot < tl.load(lengths_ptr + n * stride_lengths, mask=chosen, other=0))
    else:
        is_soft = chosen
    is_nothing = (token == PADDING) | (is_slot & (n == -1)) | (chosen & (is_soft == 0))
    known = is_word | is_soft | is_nothing

    fits = column < WIDTH
    vocab_row = vocab_ptr + tl.where(is_word, token, 0) * stride_vocab_v
    soft_row = soft_ptr + tl.where(is_soft, n, 0) * stride_soft_n + tl.where(is_soft, slot, 0) * stride_soft_p
    word = tl.load(vocab_row[:, None] + column * stride_vocab_d, mask=is_word[:, None] & fits, other=0.0).to(tl.float32)
    soft = tl.load(soft_row[:, None] + column * stride_soft_d, mask=is_soft[:, None] & fits, other=0.0).to(tl.float32)
    value = tl.where(is_soft[:, None], soft, word) * scale
    if positions_ptr is not None:
        place = positions_ptr + t * stride_positions_t
        value += tl.load(place[:, None] + column * stride_positions_d, mask=(is_word | is_soft)[:, None] & fits, other=0.0).to(
            tl.float32
        )
    value = tl.where(known[:, None], value, float("nan"))
    out = out_ptr + row * WIDTH
    tl.store(out[:, None] + column, rounded(value, out_ptr.dtype.element_ty), mask=live[:, None] & fits)


def soft_gather(ids, vocab, soft, index, lengths, positions, scale, dtype, padding, launch):
    """The embeddings [B, T, d] in a dtype. Without an index there is one prompt, or one a sample."""
    batch, length = ids.shape
    prompts, slots, width = soft.shape
    out = torch.empty((batch, length, width), dtype=dtype, device=ids.device)
    if out.numel():
        soft_gather_kernel[(triton.cdiv(batch * length, launch.ROWS) * triton.cdiv(width, launch.COLUMNS),)](
            ids, vocab, soft, index, lengths, positions, out,
            batch * length, length, vocab.shape[0], prompts, slots,
            *ids.stride(), *vocab.stride(), *soft.stride(),
            0 if index is None else index.stride(0), 0 if lengths is None else lengths.stride(0),
            *((0, 0) if positions is None else positions.stride()),
            scale,
            OWN=prompts > 1, PADDING=padding, WIDTH=width, ROWS=launch.ROWS, COLUMNS=launch.COLUMNS,
            num_warps=launch.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out
