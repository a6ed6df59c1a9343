"""Causality by gradients, of each layer and of whole networks."""

import pytest
import torch

from priors import LevelShape, PixelAttention, PixelCNN, PixelConvA, PixelConvB, PixelPosition, from_preset
from vqmill.errors import CodesError

HEIGHT, WIDTH = 5, 6
KERNELS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 3)]
CONDITIONS = [None, "global", "spatial"]
OPTIONS = {"norm": True, "vertical_residual": True, "dropout": 0.1}


def condition_of(kind, depth=4, height=HEIGHT, width=WIDTH):
    shapes = {None: None, "global": (1, depth), "spatial": (1, depth, height, width)}
    return None if shapes[kind] is None else torch.randn(shapes[kind], dtype=torch.float64)


def influence(net, image):
    """[h, w, h, w] bool: does the input at the last two places change the output at the first two?"""
    image = image.clone().requires_grad_()
    output = net(image)
    weights = (
        torch.rand(output.shape[1], dtype=output.dtype) + 0.5
    )  # a plain sum over channels is constant after a norm
    rows, columns = output.shape[2:]
    grads = [
        torch.autograd.grad((output[0, :, r, c] * weights).sum(), image, retain_graph=True)[0].abs().sum((0, 1))
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.stack(grads).view(rows, columns, rows, columns) > 0


def expected(reach_up, reach_side, rows=HEIGHT, columns=WIDTH, same_row=True):
    """Exactly the past in raster order, as far as the layers reach."""
    table = torch.zeros(rows, columns, rows, columns, dtype=torch.bool)
    for r in range(rows):
        for c in range(columns):
            for y in range(rows):
                for x in range(columns):
                    above = 0 < r - y <= reach_up and abs(c - x) <= reach_side
                    left = same_row and y == r and 0 < c - x <= reach_side
                    table[r, c, y, x] = above or left
    return table


@pytest.mark.parametrize(("horizontal", "vertical"), KERNELS)
@pytest.mark.parametrize("kind", CONDITIONS)
def test_first_layer_sees_exactly_its_past(horizontal, vertical, kind):
    torch.manual_seed(0)
    layer = PixelConvA(3, 5, None if kind is None else 4, horizontal=horizontal, vertical=vertical).double()
    conds = condition_of(kind)
    image = torch.randn(1, 3, HEIGHT, WIDTH, dtype=torch.float64)
    vert = influence(lambda x: layer(x, conds)[0], image)
    horiz = influence(lambda x: layer(x, conds=conds)[1], image)
    assert torch.equal(vert, expected(vertical, horizontal, same_row=False))
    assert torch.equal(horiz, expected(vertical, horizontal))


@pytest.mark.parametrize(("horizontal", "vertical"), KERNELS)
@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["source", "improved"])
def test_later_layers_see_themselves_and_their_past(horizontal, vertical, kind, options):
    torch.manual_seed(0)
    layer = PixelConvB(3, 5, None if kind is None else 4, horizontal, vertical, **options).double()
    conds = condition_of(kind)
    stacks = torch.randn(1, 6, HEIGHT, WIDTH, dtype=torch.float64)
    vert_in, horiz_in = stacks[:, :3], stacks[:, 3:]
    own = torch.eye(HEIGHT * WIDTH, dtype=torch.bool).view(HEIGHT, WIDTH, HEIGHT, WIDTH)
    near = expected(vertical, horizontal, same_row=False)
    beside = torch.zeros_like(near)
    left = torch.zeros_like(near)
    for r in range(HEIGHT):
        for c in range(WIDTH):
            beside[r, c, r, max(0, c - horizontal) : c + horizontal + 1] = True
            left[r, c, r, max(0, c - horizontal) : c + 1] = True
    vert_from_vert = influence(lambda x: layer(x, horiz_in, conds)[0], vert_in)
    horiz_from_vert = influence(lambda x: layer(x, horiz_in, conds)[1], vert_in)
    horiz_from_horiz = influence(lambda x: layer(vert_in, x, conds)[1], horiz_in)
    assert torch.equal(vert_from_vert, near | beside | own)
    assert torch.equal(horiz_from_vert, near | beside | own)
    assert torch.equal(horiz_from_horiz, left)
    with pytest.raises(RuntimeError, match="unused"):  # the vertical stack never hears the horizontal one
        influence(lambda x: layer(vert_in, x, conds)[0], horiz_in)


@pytest.mark.parametrize(("horizontal", "vertical"), [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["source", "improved"])
def test_a_network_sees_exactly_its_past_without_a_blind_spot(horizontal, vertical, kind, options):
    torch.manual_seed(0)
    depth = None if kind is None else 4
    kernel = {"horizontal": horizontal, "vertical": vertical}
    net = PixelCNN(
        PixelConvA(3, 6, depth, **kernel),
        PixelPosition(6, (HEIGHT, WIDTH)),
        PixelConvB(6, cond_depth=depth, **kernel, **options),
        PixelConvB(6, 4, cond_depth=depth, **kernel, **options),
    ).double()
    conds = condition_of(kind)
    image = torch.randn(1, 3, HEIGHT, WIDTH, dtype=torch.float64)
    seen = influence(lambda x: torch.cat(net(x, conds), dim=1), image)
    assert torch.equal(seen, expected(3 * vertical, 3 * horizontal))


def all_before(rows=HEIGHT, columns=WIDTH, itself=False):
    """Every place before a place in raster order, however far; with the place itself if wanted."""
    table = torch.ones(rows * columns, rows * columns, dtype=torch.bool)
    return table.tril(0 if itself else -1).view(rows, columns, rows, columns)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_attention_sees_itself_and_all_before_in_its_own_stack_alone(norm):
    torch.manual_seed(0)
    layer = PixelAttention(6, 2, norm=norm).double()
    stacks = torch.randn(1, 12, HEIGHT, WIDTH, dtype=torch.float64)
    vert, horiz = stacks[:, :6], stacks[:, 6:]
    assert torch.equal(influence(lambda x: layer(vert, x)[1], horiz), all_before(itself=True))
    assert torch.equal(layer(vert, horiz)[0], vert)


def test_a_network_with_attention_sees_farther_and_never_itself():
    torch.manual_seed(0)
    layers = [PixelConvA(3, 6), PixelAttention(6, 2), PixelConvB(6), PixelAttention(6, 3)]
    image = torch.randn(1, 3, HEIGHT, WIDTH, dtype=torch.float64)
    seen = influence(lambda x: torch.cat(PixelCNN(*layers).double()(x), dim=1), image)
    assert not (seen & ~all_before()).any()
    assert seen[4, 5, 0, :5].all()  # three rows of 2 + 2 columns is all that the convolutions reach
    assert not influence(lambda x: PixelCNN(*layers[::2]).double()(x)[1], image)[4, 5, 0, :1].any()


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("name", ["top", "bottom"])
@pytest.mark.parametrize(
    ("preset", "options"), [("pixelcnn-tiny", {"num_layers": 5}), ("pixelcnn-tiny", {"attention_every": 2}), ("gpt-tiny", {})],
    ids=["gated", "attention", "gpt"],
)  # fmt: skip
def test_the_whole_prior_is_strictly_causal(num_classes, name, preset, options):
    torch.manual_seed(0)
    levels = [LevelShape("top", 5, (2, 3)), LevelShape("bottom", 7, (4, 6))]
    prior = from_preset(preset, levels, num_classes, "tok", depth=8, **options).double().eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(2)
    level = prior.level_prior(name)
    label = torch.tensor([1]) if num_classes else None
    condition = level.condition(label, {"top": torch.randint(0, 5, (1, 2, 3))})
    codes = torch.randint(0, level.shape.codebook_size, (1, *level.shape.grid))
    embedded = []
    hook = level.network.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits = level(codes, condition)
    hook.remove()
    rows, columns = level.shape.grid
    weights = torch.rand(logits.shape[1], dtype=logits.dtype)
    sums = [(logits[0, :, r, c] * weights).sum() for r in range(rows) for c in range(columns)]
    seen = torch.zeros(rows * columns, rows * columns)
    for place, total in enumerate(sums):
        gradient = torch.autograd.grad(total, embedded[0], retain_graph=True)[0].abs().sum(-1).flatten()
        seen[place, : len(gradient)] = gradient  # a transformer never looks at the last code
    assert torch.equal(seen.view(rows, columns, rows, columns) > 0, all_before(rows, columns))


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1)])
def test_thin_grids_work(grid):
    prior = from_preset("pixelcnn-tiny", [LevelShape("codes", 5, grid)], 0, "tok").eval()
    codes = torch.randint(0, 5, (2, *grid))
    assert prior.level_prior("codes")(codes, None).shape == (2, 5, *grid)


def test_constructor_arguments_keep_their_places():
    first = PixelConvA(3, 8, 4, 2, 3)
    later = PixelConvB(8, 8, 4, 2, 3)
    assert first.vertical_conv.kernel_size == (3, 5)
    assert first.horizontal_conv.kernel_size == (1, 2)
    assert later.vertical_conv.kernel_size == (4, 5)
    assert later.horizontal_conv.kernel_size == (1, 3)
    assert PixelConvB(8).depth_out == 8
    assert (PixelConvA(3, 8).horizontal, PixelConvA(3, 8).vertical) == (2, 2)


def test_a_condition_that_would_be_dropped_is_refused():
    with pytest.raises(ValueError, match="cond_depth=None"):
        PixelConvA(3, 8)(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2))


def test_global_and_constant_spatial_conditions_agree():
    layer = PixelConvA(3, 8, 4).double()
    image = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    conds = torch.randn(2, 4, dtype=torch.float64)
    for alike, spread in zip(
        layer(image, conds), layer(image, conds[:, :, None, None].expand(2, 4, 4, 5)), strict=True
    ):
        torch.testing.assert_close(alike, spread)
    assert not torch.allclose(layer(image, conds)[1], layer(image)[1])


def test_wrong_grid_is_refused():
    prior = from_preset("pixelcnn-tiny", [LevelShape("codes", 5, (4, 4))], 0, "tok")
    with pytest.raises(CodesError, match=r"expected codes \[N, 4, 4\]"):
        prior.level_prior("codes")(torch.zeros(1, 5, 4, dtype=torch.int64), None)
