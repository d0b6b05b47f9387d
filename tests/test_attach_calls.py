"""Prompts attached at a model's calls of PyTorch's attention: VPT's loop by hand, in float64 to 1e-9.

timm, torchvision and open_clip run where they can be imported, for instance after
`pip install --no-deps --target DIR timm open_clip_torch torchvision huggingface_hub ftfy regex wcwidth`, by PYTHONPATH=DIR and
this file alone: transformers too would import that torchvision.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastprompt
from fastprompt import nn as fnn
from fastprompt.clip import ConditionalPrompts, ContextPrompts, CoupledPrompts, ImageFeatures, ZeroShot
from fastprompt.hoist import Inexact
from tests.test_readme import BLOCKS, small

B, T, P, WIDTH, HEADS, LAYERS = 3, 6, 5, 32, 4, 3


class Block(nn.Module):
    """Somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))
        self.mask: Tensor | None = None
        self.causal = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Tower(nn.Module):
    def __init__(self, make, batch_first: bool = True) -> None:
        super().__init__()
        self.blocks, self.norm = nn.ModuleList(make() for _ in range(LAYERS)), nn.LayerNorm(WIDTH)
        self.batch_first, self.blocks_a_checkpoint, self.reentrant = batch_first, 0, False

    def forward(self, x: Tensor) -> Tensor:
        x, size = x if self.batch_first else x.transpose(0, 1), self.blocks_a_checkpoint
        for start in range(0, LAYERS, size or LAYERS):
            run = nn.Sequential(*self.blocks[start : start + (size or LAYERS)])
            x = checkpoint(run, x, use_reentrant=self.reentrant) if size else run(x)
        return self.norm(x if self.batch_first else x.transpose(0, 1))


def encoder_layer(batch_first: bool = True, norm_first: bool = True) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=batch_first, norm_first=norm_first)


class Library:
    """The three libraries; the schemas of torchvision's operators are declared, because its binary may not load."""

    @staticmethod
    @functools.cache
    def load():
        kept = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):  # its binary did load
                kept.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        timm, torchvision, open_clip = (pytest.importorskip(n, reason="needs timm") for n in ("timm", "torchvision", "open_clip"))
        return timm, torchvision, open_clip, kept

    @staticmethod
    def timm():
        kind = Library.load()[0].models.vision_transformer.VisionTransformer
        return kind(img_size=8, patch_size=4, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS, num_classes=5)

    @staticmethod
    def torchvision():
        return Library.load()[1].models.VisionTransformer(8, 4, LAYERS, HEADS, WIDTH, 48, num_classes=5)

    @staticmethod
    def open_clip():
        return Library.load()[2].model.CLIP(
            16,
            {"image_size": 8, "layers": LAYERS, "width": WIDTH, "head_width": 8, "patch_size": 4},
            {"context_length": 8, "vocab_size": 61, "width": WIDTH, "heads": HEADS, "layers": LAYERS},
        )


OWN = {
    "calls": lambda: Tower(Block),
    "multi-head": lambda: Tower(encoder_layer),
    "multi-head, tokens first": lambda: Tower(lambda: encoder_layer(False, False), False),
}
LIBRARIES = {"timm": Library.timm, "torchvision": Library.torchvision, "open_clip": Library.open_clip}


@functools.cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = (OWN | LIBRARIES)[name]().double().eval().requires_grad_(False)
    for place, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.25)
        elif place.endswith("bias"):
            parameter.data.normal_(std=0.1)
    return model


def deep(length: int = P, seed: int = 2, **options) -> fnn.DeepPrompt:
    prompt = fnn.DeepPrompt(LAYERS, length, WIDTH, **options).double()
    prompt.prompt.data.normal_(generator=torch.Generator().manual_seed(seed))
    return prompt


def rows() -> Tensor:
    return torch.randn(B, T, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def images() -> Tensor:
    return torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def loop(blocks, x: Tensor, prompts) -> Tensor:
    """VPT-deep as published, on [B, T, width]: [CLS, a layer's prompt, the other rows]."""
    length = 0
    for block, prompt in zip(blocks, prompts, strict=True):
        x = block(torch.cat([x[:, :1], prompt.expand(len(x), -1, -1), x[:, 1 + length :]], 1))
        length = prompt.shape[1]
    return torch.cat([x[:, :1], x[:, 1 + length :]], 1)


def agree(got: Tensor, want: Tensor, prompt) -> None:
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    trained = list(prompt.parameters())
    mine, theirs = (torch.autograd.grad(out, trained, g) for out in (got, want))
    for one, other in zip(mine, theirs, strict=True):
        assert other.abs().max() > 1e-3, "a gradient that says nothing"
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def traces(model: nn.Module) -> list:
    return [
        (sorted(vars(part)), len(part._forward_hooks), part.training, dict(vars(part)).get("forward")) for part in model.modules()
    ]


@pytest.mark.parametrize("name", OWN)
def test_deep_prompts_at_the_calls(name):
    """Also where PyTorch's fast path for inference would pass the attention by; and the same as a prefix."""
    model, prompt = model_of(name), deep()
    before, bare = traces(model), model(rows())
    if model.batch_first:
        want = model.norm(loop(model.blocks, rows(), prompt()))
    else:
        want = model.norm(loop([lambda x, b=b: b(x.transpose(0, 1)).transpose(0, 1) for b in model.blocks], rows(), prompt()))
    handle = fastprompt.attach(model, prompt)
    assert "path: calls of PyTorch's attention in blocks" in repr(handle)
    agree(model(rows()), want, handle)
    with torch.no_grad():
        torch.testing.assert_close(model(rows()), want, rtol=1e-9, atol=1e-9)
        pairs = handle._path.deep(prompt())
    with handle.disabled():
        assert torch.equal(model(rows()), bare)
    handle.detach()
    assert traces(model) == before
    assert torch.equal(model(rows()), bare)
    prefix = fnn.PrefixKV(LAYERS, HEADS, P, WIDTH // HEADS, init=pairs).double()
    prefix.prefix.data = torch.stack([torch.stack(pair) for pair in pairs])
    handle = fastprompt.attach(model, prefix)
    torch.testing.assert_close(model(rows()), want, rtol=1e-9, atol=1e-9)
    model(rows()).pow(3).sum().backward()
    assert prefix.prefix.grad.abs().max() > 1e-3
    handle.detach()


@pytest.mark.parametrize("name", OWN)
def test_every_sample_its_own_prompt_at_the_calls(name):
    model, prompts = model_of(name), [deep(), deep(2, 5)]
    handle = fastprompt.attach(model, prompts, use=[1, None, 0])
    mixed = model(rows())
    for sample, number in enumerate([1, None, 0]):
        handle.use(number)
        torch.testing.assert_close(model(rows()[sample : sample + 1]), mixed[sample : sample + 1], rtol=1e-9, atol=1e-9)
    handle.detach()


@pytest.mark.parametrize(
    ("name", "size"), [("calls", 1), ("calls", 2), ("calls", 3), ("multi-head", 1), ("multi-head, tokens first", 2)]
)
def test_gradient_checkpointing_at_the_calls(name, size):
    """Blocks alone, two in one checkpoint, all in one; two passes on one input, by other prompts, before a backward."""
    model, prompts = copy.deepcopy(model_of(name)), nn.ModuleList([deep(), deep(2, 5)])
    handle, x, runs = fastprompt.attach(model, list(prompts)), rows(), []
    want = model(x) + handle.use(1).model(x)
    hook = model.blocks[0].mlp[1] if name == "calls" else model.blocks[0].linear1
    hook.register_forward_hook(lambda *_: runs.append(torch._C._current_graph_task_id() != -1))
    model.blocks_a_checkpoint = size
    got = handle.use(0).model(x) + handle.use(1).model(x)
    assert len(handle._path._again) == 2 * -(-LAYERS // size)
    handle.use(None)
    agree(got, want, prompts)
    assert runs == [False] * 2 + [True] * 2, "blocks that were not run again"
    if name == "calls":
        gc.collect()  # what a pass read goes with its graph
        assert not handle._path._again
    handle.detach()


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_what_checkpointing_refuses():
    model, prompt = Tower(Block).double(), deep()
    handle = fastprompt.attach(model, prompt)
    model.blocks_a_checkpoint, model.reentrant = 1, True
    with pytest.raises(Inexact, match=r"run without a graph inside a model that makes one; .* say use_reentrant=False"):
        model(rows())
    with torch.no_grad():
        model(rows())
    model.blocks_a_checkpoint = 0
    model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(rows())
    with torch.no_grad():
        model.blocks[0](rows())  # no call of the model is going on
    x = rows().requires_grad_()
    for block in model.blocks:  # past the model's own call
        x = checkpoint(block, x, use_reentrant=True)
    with pytest.raises(Inexact, match="run again by backward, where its prompt is not known"):
        x.sum().backward()
    model.reentrant = False
    model.norm._forward_hooks.clear()
    with pytest.raises(Inexact, match="two runs of the model in one checkpoint"):
        checkpoint(lambda x: model(x) + model(x), rows().requires_grad_(), use_reentrant=False)
    model.blocks_a_checkpoint = 1
    with pytest.raises(Inexact, match=r"run again by backward.*not inside another checkpoint"):
        checkpoint(model, rows().requires_grad_(), use_reentrant=False).sum().backward()
    handle.detach()


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("name", LIBRARIES)
def test_the_checkpointing_of_libraries(name):
    model, prompt = copy.deepcopy(model_of(name)), deep(patch=4)
    part = "visual" if name == "open_clip" else None
    run = (lambda: model.encode_image(images())) if part else (lambda: model(images()))
    handle, runs = fastprompt.attach(model, prompt, part=part), []
    for each in model.modules():
        if isinstance(each, nn.GELU):
            each.register_forward_hook(lambda *_: runs.append(torch._C._current_graph_task_id() != -1))
    want = run()
    if name == "torchvision":  # has no switch
        layers, model.encoder.layers = model.encoder.layers, nn.Sequential()
        model.encoder.layers.forward = lambda x: checkpoint_sequential(layers, 2, x, use_reentrant=False)
    else:
        model.set_grad_checkpointing(True)
    agree(run(), want, prompt)
    assert True in runs
    if name == "timm":
        Library.load()[0].layers.set_reentrant_ckpt(True)
        try:
            with pytest.raises(Inexact, match="use_reentrant=False"):
                run()
        finally:
            Library.load()[0].layers.set_reentrant_ckpt(False)
    handle.detach()


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_vision_transformers_of_libraries(name):
    model, prompt = model_of(name), deep(patch=4)
    before, part = traces(model), None
    if name == "timm":
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images()))))
        want, run = model.forward_head(model.norm(loop(model.blocks, x, prompt()))), model
    elif name == "torchvision":
        x = model._process_input(images())
        x = torch.cat([model.class_token.expand(B, -1, -1), x], 1) + model.encoder.pos_embedding
        want, run = model.heads(model.encoder.ln(loop(model.encoder.layers, x, prompt()))[:, 0]), model
    else:
        tower, part, run = model.visual, "visual", functools.partial(model.encode_image, normalize=False)
        x = tower._embeds(images())
        want = tower.ln_post(loop(tower.transformer.resblocks, x, prompt()))[:, 0] @ tower.proj
        with pytest.raises(ValueError, match="blocks: expected the name of the list of the 3 blocks, got 2 lists"):
            fastprompt.attach(model, prompt)
    bare = run(images())
    handle = fastprompt.attach(model, prompt, part=part)
    agree(run(images()), want, handle)
    with torch.no_grad():
        torch.testing.assert_close(run(images()), want, rtol=1e-9, atol=1e-9)
    handle.detach()
    assert torch.equal(run(images()), bare)
    assert traces(model) == before
    assert (bare - want).abs().max() > 1e-3


RESNETS = {
    "timm": lambda: Library.load()[0].models.resnet.ResNet(
        Library.load()[0].models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=9
    ),
    "torchvision": lambda: Library.load()[1].models.resnet18(num_classes=9),
}


@pytest.mark.parametrize("head", ["fc", None])
@pytest.mark.parametrize("name", RESNETS)
def test_the_resnets_of_libraries(name, head):
    """A prompt on the input and a label map; images as bytes too."""
    torch.manual_seed(0)
    model, prompt = RESNETS[name]().double().eval(), fnn.PaddedPrompt(32, 16, mean=0.4, std=0.3, init="normal").double()
    labels, shots = fnn.LabelMap(9, 4), torch.rand(B, 3, 16, 16, dtype=torch.float64)
    before, bare = traces(model), model(prompt(shots))
    handle = fastprompt.attach(model, prompt, outputs=labels, head=head)
    agree(model(shots), labels(bare), handle)
    handle.detach()
    assert traces(model) == before
    assert torch.equal(model(prompt(shots)), bare)
    handle, shots = fastprompt.attach(model.float(), prompt.float()), (shots * 255).to(torch.uint8)
    got = model(shots)
    handle.detach()
    assert torch.equal(got, model(prompt(shots)))


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_the_readme_s_example_on_the_libraries_it_names(name):
    block = next(small(block) for page, block in BLOCKS if page == "README.md" and "(vit, " in block)
    timm, torchvision, *_ = Library.load()
    if name == "timm":
        made = timm.models.vision_transformer.VisionTransformer(embed_dim=32, depth=2, num_heads=2)
    else:
        made = torchvision.models.VisionTransformer(224, 16, 2, 2, 32, 32)
    names = {"fastprompt": fastprompt, "vit": made, "images": torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)}
    exec(compile(block, "README.md", "exec"), names)
    assert names["out"].shape == (2, 10)


def test_timm_without_its_fused_attention():
    model = Library.timm().double()
    for block in model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(Inexact, match=r"Block: 0 calls of scaled_dot_product_attention.*set_fused_attn"):
        fastprompt.attach(model, deep())


def test_masks_at_the_calls():
    """Which keys are seen, by sample or by query; and causal blocks."""
    model, prompt = Tower(Block).double(), deep()
    handle = fastprompt.attach(model, prompt)
    masks = (torch.rand(B, 1, 1, T) < 0.7, torch.rand(T, T) < 0.7, None)
    for mask in masks:
        seen = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else mask
        for block in model.blocks:
            block.mask, block.causal = mask, mask is None
        got = model(rows())
        whole = torch.cat([torch.ones((*seen.shape[:-1], P), dtype=torch.bool), seen], -1)  # prompts first
        whole = whole.expand(*whole.shape[:-2], T, P + T)
        want = rows()
        with handle.disabled():
            for block, tokens in zip(model.blocks, prompt(), strict=True):
                full = torch.cat([torch.ones((*whole.shape[:-2], P, P + T), dtype=torch.bool), whole], -2)
                block.mask, block.causal = full, False
                want = block(torch.cat([tokens.expand(B, -1, -1), want], 1))[:, P:]
        agree(got, model.norm(want), handle)
    handle.detach()


def test_threads_do_not_see_each_other():
    models, prompts = [Tower(Block).double().eval() for _ in range(2)], [deep(), deep(3, 7)]
    handles = [fastprompt.attach(model, prompt) for model, prompt in zip(models, prompts, strict=True)]
    alone = [model(rows()) for model in models]
    with ThreadPoolExecutor(2) as pool:
        together = [run.result() for run in [pool.submit(model, rows()) for model in models * 4]]
    for place, out in enumerate(together):
        assert torch.equal(out, alone[place % 2])
    for handle in handles:
        handle.detach()


def test_what_the_calls_refuse():
    model, prompt = Tower(Block).double(), deep()
    before = traces(model)
    for wrong, given, options, message in (
        (model, fnn.SoftPrompt(P, WIDTH), {}, "Tower: not a model of transformers, whose embeddings"),
        (model, fnn.DeepPrompt(2, P, WIDTH), {}, "blocks: expected the name of the list of the 2 blocks, got 0 lists: none"),
        (model, fnn.DeepPrompt(2, P, WIDTH), {"blocks": "blocks"}, "prompt.layers: expected the 3 blocks of blocks, got 2"),
        (model, fnn.DeepPrompt(LAYERS, P, 16), {}, "prompt 0: expected width=32 for Tower, got 16"),
        (model, deep(which=[0]), {"fallback": "tokens"}, "fallback: tokens in every sample need a model of transformers"),
        (nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]).double(), prompt, {}, "Linear: 0 calls of scaled"),
        (Tower(lambda: nn.TransformerDecoderLayer(WIDTH, HEADS)).double(), prompt, {}, "Layer: does not run on the tokens of a"),
        (
            Tower(lambda: nn.Sequential(nn.Linear(WIDTH, 7), Block())).double(),
            prompt,
            {},
            "Sequential: does not run on the tokens of a prompt alone",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fastprompt.attach(wrong, given, **options)
        assert not any("forward" in vars(part) for part in wrong.modules())
    handle = fastprompt.attach(model, prompt)
    with pytest.raises(ValueError, match=r"call detach\(\) on its handle first"):
        fastprompt.attach(model, prompt)
    model.blocks[1].mask = torch.zeros(T, T, dtype=torch.float64)
    with pytest.raises(Inexact, match=r"a torch\.float64 bias on its scores"):
        model(rows())
    model.blocks[1].mask = None
    with pytest.raises(RuntimeError):
        model(rows()[..., :16])
    with pytest.raises(Inexact, match="part of a copy of a model with a prompt"):
        copy.deepcopy(model)(rows())
    handle.detach()
    assert traces(model) == before
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.3)
    dropping = Tower(lambda: layer.__class__(WIDTH, HEADS, 48, 0.3)).double().train()
    with pytest.raises(Inexact, match=r"dropout.*eval mode"):
        fastprompt.attach(dropping, deep(), freeze=False)
    fastprompt.attach(dropping, deep()).detach()
    assert dropping.training


# ---- The text side of open_clip's CLIP ----


@functools.cache
def clip_of(kind: str, depths: tuple[int, int] = (3, 2), **text) -> nn.Module:
    made = getattr(Library.load()[2].model, kind)
    sizes = {"width": WIDTH, "layers": depths[0], "context_length": 14, "vocab_size": 61, "heads": HEADS}
    vision = {"image_size": 8, "layers": depths[1], "width": 24, "head_width": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = made(16, vision, sizes | text, quick_gelu=True, init_logit_bias=-2.0).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.25)
        elif name.endswith(("bias", "gamma")):
            parameter.data.normal_(std=0.4)
    return model


def put_in(model: nn.Module, ids: Tensor, context: Tensor, run):
    """What `run` gives while the ids below 0 are the rows of a context [C, M, width]."""
    side = getattr(model, "text", model)
    hook = side.token_embedding.register_forward_hook(
        lambda table, args, out: out.masked_scatter((ids < 0)[..., None], context.to(out.dtype))
    )
    try:
        return run(ids.clamp(min=1))
    finally:
        hook.remove()


CLIPS = {
    "CLIP": ("CLIP", {}),
    "eos": ("CLIP", {"pool_type": "eos", "eos_id": 7, "ls_init_value": 0.5}),
    "custom text": ("CustomTextCLIP", {"proj_bias": True}),
}


@pytest.mark.parametrize("name", CLIPS)
def test_clip_prompts_of_open_clip(name):
    kind, options = CLIPS[name]
    model, start, stop, end = clip_of(kind, **options), 59, 5, 7 if name == "eos" else 60
    names = [[11], [12, 13, 14], [12, 15]]
    rows = [[start, *each, stop, end] for each in names]
    tokens = torch.tensor([row + [0] * (14 - len(row)) for row in rows])
    whole = [[start, -1, -1, -1, *each, stop, end] for each in names]
    ids = torch.tensor([row + [3] * (14 - len(row)) for row in whole])
    torch.testing.assert_close(ZeroShot(model, tokens).features(), model.encode_text(tokens), rtol=1e-9, atol=1e-9)
    images = torch.randn(B, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    prompts = ContextPrompts(model, tokens, context=3)
    prompts.context.data.normal_()
    own = prompts.context.expand(3, -1, -1)
    want = put_in(model, ids, own, model.encode_text)
    parts = nn.ParameterList([prompts.context])
    agree(prompts.features(), want, parts)
    both = put_in(model, ids, own, lambda ids: model.get_logits(images, ids)[0])
    agree(fastprompt.Reprogrammed(ImageFeatures(model), outputs=prompts)(images), both, parts)

    shifted = ConditionalPrompts(model, tokens, context=3, hidden=2)
    image = model.encode_image(images, normalize=True)
    contexts = shifted.context + shifted.shift(image)[:, None]
    want = torch.stack([put_in(model, ids, each.expand(3, -1, -1), model.encode_text) for each in contexts])
    agree(shifted.features(image), want, nn.ParameterList([shifted.context, *shifted.shift.parameters()]))


@pytest.mark.parametrize(("depth", "depths"), [(1, (3, 3)), (2, (3, 3)), (2, (3, 2))], ids=str)
def test_coupled_prompts_of_open_clip(depth, depths):
    model = clip_of("CLIP", depths)
    tokens = torch.tensor([[59, 11, 5, 60, 0, 0], [59, 12, 13, 5, 60, 0]])
    ids = torch.tensor([[59, -1, -1, 11, 5, 60, *[0] * 8], [59, -1, -1, 12, 13, 5, 60, *[0] * 7]])
    images = torch.randn(B, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    prompts = CoupledPrompts(model, tokens, context=2, depth=depth)
    prompts.prompt.data.normal_()

    def text(place, block, args, kwargs):
        x = torch.cat([args[0][:, :1], prompts.prompt[place].expand(2, -1, -1), args[0][:, 3:]], 1)
        return (x, *args[1:]), kwargs

    def vision(place, block, args, kwargs):
        x = args[0] if place == 0 else args[0][:, :-2]
        return (torch.cat([x, prompts.maps[place](prompts.prompt[place]).expand(B, -1, -1)], 1), *args[1:]), kwargs

    with contextlib.ExitStack() as hooks:
        for place in range(depth):
            for side, change in ((model.transformer, text), (model.visual.transformer, vision)):
                if place or change is vision:
                    hook = functools.partial(change, place)
                    hooks.callback(side.resblocks[place].register_forward_pre_hook(hook, with_kwargs=True).remove)
        want = put_in(model, ids, prompts.prompt[0].expand(2, -1, -1), lambda ids: model.get_logits(images, ids)[0])
    got = fastprompt.Reprogrammed(ImageFeatures(model, prompts), outputs=prompts)(images)
    agree(got, want, nn.ParameterList([prompts.prompt, *prompts.maps.parameters()]))


def test_what_the_text_side_of_open_clip_refuses():
    tokens = torch.tensor([[59, 11, 5, 60]])
    for options, message in (
        ({"no_causal_mask": True}, "clip: expected a causal text side without a class token, got CLIP with another"),
        ({"pool_type": "last"}, "clip.text_pool_type: expected one of argmax, eos, got 'last'"),
        ({"qk_norm": True}, "clip: expected a CLIP of transformers or open_clip with its usual text blocks, got CLIP"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ContextPrompts(clip_of("CLIP", **options), tokens, context=2)
    with pytest.raises(ValueError, match=r"with an end-of-text token \(id 7\)"):
        ZeroShot(clip_of(*CLIPS["eos"][:1], **CLIPS["eos"][1]), tokens)
