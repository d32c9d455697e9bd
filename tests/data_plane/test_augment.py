"""Each operation with forced draws, through DALI, against torchvision on real photographs."""

from __future__ import annotations

import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from nvidia.dali import fn, pipeline_def
from PIL import Image, ImageEnhance, ImageFilter
from scipy import stats
from sklearn.datasets import load_sample_images
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from ssl_pipeline import config
from ssl_pipeline.data import augment, randomness
from ssl_pipeline.data.augment import ViewSpec
from ssl_pipeline.exits import BadInput
from ssl_pipeline.pretrain import PretrainConfig

RAW = {"op": "normalize", "mean": [0, 0, 0], "std": [1, 1, 1]}


def photos() -> np.ndarray:
    """(2, H, W, 3) uint8: windows of scikit-learn's photographs."""
    return np.stack([photo[100:324, 150:374] for photo in load_sample_images().images])


def view(*ops: dict, size: int = 224) -> ViewSpec:
    return config.validate(ViewSpec, {"size": size, "ops": [*ops, RAW]})


def through_dali(
    spec: ViewSpec, pictures: np.ndarray, u: np.ndarray, monkeypatch: pytest.MonkeyPatch, exact: bool = False
) -> np.ndarray:
    """The view's pixels in 0..255, (N, H, W, 3), with u (N, draws) in place of the keyed numbers."""
    monkeypatch.setattr(randomness, "uniforms", lambda *_: u)
    sizes = np.array([picture.shape[:2] for picture in pictures])
    arrays = spec.parameters(0, 0, np.arange(len(pictures)), 0, sizes, exact)

    @pipeline_def(batch_size=len(pictures), num_threads=1, device_id=None)
    def graph():
        inputs = fn.external_source(source=lambda: [list(pictures), *arrays], num_outputs=1 + len(arrays), batch=True,
                                    layout=["HWC", *[""] * len(arrays)])  # fmt: skip
        return spec.nodes(inputs[0], inputs[1:], exact)

    pipeline = graph()
    pipeline.build()
    (out,) = pipeline.run()
    return np.stack([np.array(out[i]) for i in range(len(pictures))]).transpose(0, 2, 3, 1) * 255


def reference(pictures: np.ndarray, change) -> np.ndarray:
    return np.stack([change(torch.from_numpy(p).permute(2, 0, 1)).permute(1, 2, 0).numpy() for p in pictures])


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected.astype(float)).mean())


def test_flip_solarize_and_normalize_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = photos()
    u = np.array([[0.4], [0.6]])
    flipped = through_dali(view({"op": "flip", "probability": 0.5}), pictures, u, monkeypatch)
    assert difference(flipped[0], pictures[0][:, ::-1]) < 1e-4
    assert difference(flipped[1], pictures[1]) < 1e-4
    solarized = through_dali(view({"op": "solarize", "probability": 0.5}), pictures, u, monkeypatch)
    assert difference(solarized[0], reference(pictures[:1], lambda p: TF.solarize(p, 128))[0]) < 1e-4
    assert difference(solarized[1], pictures[1]) < 1e-4
    spec = config.validate(ViewSpec, {"size": 224, "ops": [{"op": "normalize"}]})
    found = through_dali(spec, pictures, np.zeros((2, 0)), monkeypatch) / 255
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = reference(pictures, lambda p: TF.normalize(p / 255, mean, std))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("size", [224, 96])
def test_crop_resize_is_torchvisions_crop_and_antialiased_bicubic(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = photos()
    u = np.random.default_rng(0).random((2, 22))
    spec = view({"op": "crop_resize"}, size=size)
    found = through_dali(spec, pictures, u, monkeypatch)
    start, end = spec.ops[0].parameters(u, np.full((2, 2), 224), size)
    for picture, got, (top, left), (bottom, right) in zip(pictures, found, start, end, strict=True):
        box = (left, top, right, bottom)
        expected = Image.fromarray(picture).crop(tuple(map(int, box))).resize((size, size), Image.Resampling.BICUBIC)
        assert difference(got, np.asarray(expected)) <= 0.7


def test_boxes_have_torchvisions_distribution() -> None:
    count = 4000
    u = randomness.uniforms(0, 0, np.arange(count), 0, 22)
    sizes = np.tile([[300, 500]], (count, 1))
    start, end = augment.CropResize(op="crop_resize").parameters(u, sizes, 224)
    assert (start >= 0).all()
    assert (end <= sizes).all()
    torch.manual_seed(0)
    picture = torch.zeros(1, 300, 500)
    theirs = np.array([RandomResizedCrop.get_params(picture, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    ours = np.concatenate([start, end - start], axis=1)
    for column in range(4):
        for quantile in (0.1, 0.5, 0.9):
            a, b = np.quantile(ours[:, column], quantile), np.quantile(theirs[:, column], quantile)
            assert abs(a - b) < 15, (column, quantile, a, b)


def test_a_picture_that_no_box_fits_is_cropped_in_the_centre() -> None:
    start, end = augment.CropResize(op="crop_resize").parameters(np.full((1, 22), 0.999), np.array([[10, 1000]]), 224)
    assert start.tolist() == [[0, 493]]
    assert end.tolist() == [[10, 506]]


def test_center_crop_is_resize_and_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = photos()
    found = through_dali(view({"op": "center_crop", "resize": 128}, size=112), pictures, np.zeros((2, 0)), monkeypatch)
    expected = reference(
        pictures,
        lambda p: TF.center_crop(TF.resize(p, [128], InterpolationMode.BICUBIC, antialias=True), [112]),
    )
    assert difference(found, expected) <= 0.7


def jitter_draws(order: tuple[int, ...] = (0, 1, 2, 3), **wanted: float) -> np.ndarray:
    """Draws that make the jitter take place in this order, with these positions within its ranges, else the middle."""
    rows = [wanted.get(name, 0.5) for name in ("brightness", "contrast", "saturation", "hue")]
    place = augment._ORDERS.tolist().index(list(order))
    return np.tile([[0.0, *rows, (place + 0.5) / 24]], (2, 1))


STEPS = {
    0: lambda p, f: TF.adjust_brightness(p, f["brightness"]),
    1: lambda p, f: TF.adjust_contrast(p, f["contrast"]),
    2: lambda p, f: TF.adjust_saturation(p, f["saturation"]),
    3: lambda p, f: TF.adjust_hue(p, f["hue"]),
}


@pytest.mark.parametrize(
    ("name", "u", "limit"),
    [
        ("brightness", 0.2, 1.0), ("saturation", 0.1, 1.0), ("saturation", 0.6, 1.0), ("contrast", 0.2, 1.5),
    ],
)  # fmt: skip
def test_each_colour_change_is_near_torchvisions(
    name: str, u: float, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = {"op": "jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "probability": 1.0}
    factors = {name: 1.0 + op[name] * (2 * u - 1)}
    pictures = photos()
    found = through_dali(view(op), pictures, jitter_draws(**{name: u}), monkeypatch)
    step = ["brightness", "contrast", "saturation"].index(name)
    expected = reference(pictures, lambda p: STEPS[step](p, factors))
    assert difference(found, expected) <= limit
    assert difference(found, expected) < 0.8 * difference(pictures, expected)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 1, 0, 3), (1, 0, 3, 2)])
def test_the_product_is_the_reference_in_the_same_order(
    order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    op = {"op": "jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.0, "probability": 1.0}
    factors = {"brightness": 0.8, "contrast": 0.7, "saturation": 1.2, "hue": 0.0}
    pictures = photos()
    u = jitter_draws(order, brightness=0.25, contrast=0.125, saturation=0.75)
    found = through_dali(view(op), pictures, u, monkeypatch)

    def change(p: torch.Tensor) -> torch.Tensor:
        for step in order:
            p = STEPS[step](p, factors)
        return p

    assert difference(found, reference(pictures, change)) <= 1.5


def test_orders_matter_and_all_are_drawn() -> None:
    op = augment.Jitter(op="jitter", probability=1.0)
    maps = [op.matrices(jitter_draws(order, hue=1.0, saturation=0.0)[:1])[0] for order in ((2, 3, 0, 1), (3, 2, 0, 1))]
    assert np.abs(maps[0] - maps[1]).max() > 0.01
    u = randomness.uniforms(0, 0, np.arange(10_000), 0, 6)
    counts = np.bincount((u[:, 5] * 24).astype(int), minlength=24)
    assert counts.min() > 300
    applied = (
        np.abs(op.model_copy(update={"probability": 0.8}).matrices(u)[0] - np.eye(3)).max(axis=(1, 2)) > 0
    ).mean()
    assert abs(applied - 0.8) < 0.02


def test_hue_by_a_third_of_the_circle_is_exact() -> None:
    np.testing.assert_allclose(augment._hue(np.array([1 / 3]))[0], [[0, 0, 1], [1, 0, 0], [0, 1, 0]], atol=1e-12)


def hue_errors(pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """(2, N) differences from torchvision's hue and (2, N) of doing nothing, by -0.1 and by 0.1: (2, 2, N)."""
    op = {"op": "jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "probability": 1.0}
    rows = []
    for u, shift in ((0.0, -0.1), (1.0, 0.1)):
        draws = np.tile(jitter_draws(hue=u)[:1], (len(pictures), 1))
        found = through_dali(view(op, size=pictures.shape[1]), pictures, draws, monkeypatch)
        expected = reference(pictures, lambda p, shift=shift: TF.adjust_hue(p, shift))
        rows.append([[difference(a, b) for a, b in zip(one, expected, strict=True)] for one in (found, pictures)])
    return np.array(rows).transpose(1, 0, 2)


def test_hue_is_near_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A common photograph, where doing nothing is 6.5 off and DALI's own hue up to 9.9; and one that is red all over."""
    found, nothing = hue_errors(photos(), monkeypatch)
    assert found[:, 0].max() <= 6
    assert found[:, 1].max() <= 20
    assert (found < nothing).all()


def test_additional_photographs_hue(test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(test_data / "imagenet_sample.tar") as archive:
        files = [io.BytesIO(archive.extractfile(m).read()) for m in archive if m.isfile()]
    pictures = np.stack([np.array(Image.open(file).convert("RGB").resize((128, 128))) for file in files])
    found, nothing = hue_errors(pictures, monkeypatch)
    print(
        f"hue by -0.1 and 0.1: mean {found.mean(axis=1)}, worst picture {found.max():.1f}; left as it is {nothing.mean():.1f}"
    )
    assert (found.mean(axis=1) <= 6).all()  # doing nothing is 7.1 off
    assert found.max() <= 24
    assert (found < nothing).mean() > 0.95


def test_gray_is_pils_and_joins_the_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = photos()
    found = through_dali(view({"op": "gray", "probability": 0.5}), pictures, np.array([[0.4], [0.6]]), monkeypatch)
    assert difference(found[0], np.asarray(Image.fromarray(pictures[0]).convert("L").convert("RGB"))) <= 1
    assert difference(found[1], pictures[1]) < 1e-4
    joined = view({"op": "jitter"}, {"op": "gray"}, {"op": "flip"})
    assert [len(group) for group in joined._groups()] == [2, 1, 1]


@pytest.mark.parametrize("u", [0.0, 0.5, 1.0])
def test_blur_is_near_pils(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = photos()
    sigma = 0.1 + 1.9 * u
    draws = np.array([[0.4, u], [0.6, u]])
    found = through_dali(view({"op": "blur", "probability": 0.5}), pictures, draws, monkeypatch)
    expected = np.asarray(Image.fromarray(pictures[0]).filter(ImageFilter.GaussianBlur(sigma)))
    assert difference(found[0], expected) <= 1.5
    assert difference(found[1], pictures[1]) < 1e-4


def test_affine_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = photos()
    op = {"op": "affine", "degrees": 30, "translate": 0.1, "scale": [0.5, 1.5]}
    u = np.tile([[0.75, 0.6, 0.7, 0.4]], (2, 1))
    found = through_dali(view(op), pictures, u, monkeypatch)
    angle, zoom, shift = 15.0, 1.1, [0.04 * 224, -0.02 * 224]
    expected = reference(
        pictures,
        lambda p: TF.affine(p.float(), angle, shift, zoom, [0.0, 0.0], InterpolationMode.BILINEAR),
    )
    assert difference(found, expected) <= 1.5


def test_identity_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = photos()
    spec = view({"op": "affine"}, {"op": "jitter", "probability": 0}, {"op": "gray", "probability": 0})
    found = through_dali(spec, pictures, np.full((2, 4 + 6 + 1), 0.5), monkeypatch)
    assert difference(found, pictures) < 0.01


def test_a_view_ends_normalized_once() -> None:
    for ops in ([], [{"op": "flip"}], [RAW, {"op": "flip"}], [RAW, RAW]):
        with pytest.raises(BadInput, match="normalize"):
            config.validate(ViewSpec, {"size": 8, "ops": ops})


def test_any_order_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear map leaves planes behind; what follows it works on these as on pixels."""
    pictures = photos()
    invert = {"op": "jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0, "hue": 0, "probability": 1.0}
    draws = np.full((2, 6), 0.5)
    draws[:, 1:3] = 0.25, 0.75  # brightness 0.8, contrast 1.2
    last = [{"op": "flip", "probability": 1.0}, {"op": "affine"}, {"op": "solarize", "probability": 1.0},
            {"op": "gray", "probability": 1.0}, {"op": "blur", "probability": 0},
            {"op": "crop_resize", "scale": [1, 1]}]  # fmt: skip
    u = np.concatenate([draws, np.full((2, 1 + 4 + 1 + 1 + 2 + 22), 0.5)], axis=1)
    found = through_dali(view(invert, *last), pictures, u, monkeypatch)
    first = through_dali(view(invert), pictures, draws, monkeypatch)[:, :, ::-1]
    solarized = torch.from_numpy(np.rint(np.minimum(first, 255 - first))).permute(0, 3, 1, 2)
    gray = (solarized * torch.tensor(augment.GRAY).view(1, 3, 1, 1)).sum(1)
    assert difference(found, gray[..., None].expand(-1, -1, -1, 3).numpy()) < 0.6


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_exact_clips_after_each_operation_as_pil_does(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    op = {"op": "jitter", "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0, "probability": 1.0}
    spec = view(op, {"op": "gray", "probability": 0})
    pictures = photos()
    u = np.concatenate([jitter_draws((*order, 3), brightness=0.9, contrast=0.9, saturation=0.9), [[0.5]] * 2], axis=1)
    factor = 1 + 0.8 * 0.8
    enhance = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]

    def change(picture: np.ndarray) -> np.ndarray:
        image = Image.fromarray(picture)
        for step in order:
            image = enhance[step](image).enhance(factor)
        return np.asarray(image)

    expected = np.stack([change(picture) for picture in pictures])
    exact = difference(through_dali(spec, pictures, u, monkeypatch, exact=True), expected)
    once = difference(through_dali(spec, pictures, u, monkeypatch), expected)
    assert exact <= 1.5
    assert exact < (1.0 if order == (2, 1, 0) else 0.4) * once  # where brightness comes last, little is clipped before


def test_exact_is_the_same_where_nothing_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = 64 + photos() // 4
    op = {"op": "jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "probability": 1.0}
    spec, u = view(op), jitter_draws((3, 1, 0, 2), brightness=0.3, contrast=0.8, saturation=0.9, hue=0.9)
    found = [through_dali(spec, pictures, u, monkeypatch, exact) for exact in (True, False)]
    assert difference(*found) <= 0.6


def test_ten_thousand_draws_are_independent_and_as_the_recipe_says() -> None:
    count = 10_000
    recipe = config.load("imagenet/barlow_twins", ["data.root=."])
    views = config.validate(PretrainConfig, recipe.values).data.views
    ids = np.arange(count)
    draws = {(epoch, place): randomness.uniforms(7, epoch, ids, place, 33) for epoch in (0, 1) for place in (0, 1)}
    for name, (a, b) in {
        "views": (draws[0, 0], draws[0, 1]),
        "epochs": (draws[0, 0], draws[1, 0]),
        "ranks": (draws[0, 0][0::2], draws[0, 0][1::2]),
        "draws of a view": (draws[0, 0][:, :-1], draws[0, 0][:, 1:]),
    }.items():
        found = np.corrcoef(a.T, b.T)[: a.shape[1], a.shape[1] :]
        if name == "draws of a view":
            found = np.diag(found)
        # 33 x 33 normal numbers of this deviation stay within 4.8 of it, but for one time in a thousand.
        assert np.abs(found).max() < 4.8 / np.sqrt(len(a)), name
    rates = {"flip": (0.5, 0.5), "jitter": (0.8, 0.8), "gray": (0.2, 0.2), "blur": (1.0, 0.1), "solarize": (None, 0.2)}
    for place, spec in enumerate(views):
        u, column = draws[0, place], 0
        for op in spec.ops:
            rate = rates.get(op.op, (None, None))[place]
            if rate is not None:
                applied = (u[:, column] < op.probability).mean()
                assert abs(applied - rate) <= 4 * np.sqrt(rate * (1 - rate) / count), (place, op.op)
            if isinstance(op, augment.Jitter):
                orders = np.bincount((u[:, column + 5] * 24).astype(int), minlength=24)
                assert stats.chisquare(orders).pvalue > 1e-4
                assert len({tuple(order) for order in augment._ORDERS.tolist()}) == 24
                brightness = view_factor(op, u[:, column : column + 6])
                assert 0.6 <= brightness.min() < 0.601
                assert 1.399 < brightness.max() <= 1.4
                assert stats.kstest((brightness - 0.6) / 0.8, "uniform").pvalue > 1e-4
            if isinstance(op, augment.Blur):
                windows = op.parameters(u[:, column : column + 2], np.ones((count, 2)), 224)[0]
                widths = {window.shape[1] for window in windows}
                assert widths == ({3, 5, 7, 9, 11, 13} | ({1} if place else set()))
            column += op.draws


def view_factor(op: augment.Jitter, u: np.ndarray) -> np.ndarray:
    """The brightness of each jitter, from its maps: contrast and the like are turned off."""
    plain = op.model_copy(update={"contrast": 0.0, "saturation": 0.0, "hue": 0.0, "probability": 1.0})
    return plain.matrices(u)[0][:, 0, 0]


def uniform(found: np.ndarray, low: float, high: float) -> None:
    """Whether numbers fill the range evenly, to its ends."""
    share = (found - low) / (high - low)
    assert -1e-6 <= share.min() < 0.001
    assert 0.999 < share.max() <= 1 + 1e-6
    assert stats.kstest(share, "uniform").pvalue > 1e-4


def test_draws_fill_the_ranges_that_the_recipes_name() -> None:
    """Each factor read back from what DALI is given, of the recipes' own options: 10,000 draws of each."""
    ids = np.arange(10_000)
    byol, small = (
        config.validate(PretrainConfig, config.load(name, ["data.root=."]).values).data.views[0].ops
        for name in ("imagenet/byol", "cifar10/simclr")
    )
    assert [op.op for op in byol[:4]] == ["crop_resize", "flip", "jitter", "gray"]
    crop, jitter = byol[0], byol[2]
    blur = next(op for op in byol if op.op == "blur")

    def drawn(op: augment.Operation) -> np.ndarray:
        return randomness.uniforms(7, 0, ids, 0, op.draws)

    def factor(jitter: augment.Jitter, name: str) -> tuple[np.ndarray, np.ndarray]:
        off = {other: 0.0 for other in ("brightness", "contrast", "saturation", "hue") if other != name}
        return jitter.model_copy(update={**off, "probability": 1.0}).matrices(drawn(jitter))

    for op in (jitter, next(op for op in small if op.op == "jitter")):
        brightness, contrast = factor(op, "brightness")[0], factor(op, "contrast")
        uniform(brightness[:, 0, 0], 1 - op.brightness, 1 + op.brightness)
        uniform(contrast[0][:, 0, 0], 1 - op.contrast, 1 + op.contrast)
        np.testing.assert_allclose(contrast[1].sum(axis=2), 1 - contrast[0][:, [0, 1, 2], [0, 1, 2]], atol=1e-9)
        saturation = factor(op, "saturation")[0]  # gray keeps its place, and a coloured difference is scaled
        uniform(
            (saturation @ [1, 0, -1])[:, 0] - (saturation @ [1, 0, -1])[:, 2] - 1,
            1 - 2 * op.saturation,
            1 + 2 * op.saturation,
        )
        hue = factor(op, "hue")[0]
        cosine, sine = (np.trace(hue, axis1=1, axis2=2) - 1) / 2, (hue[:, 1, 0] - hue[:, 0, 1]) * np.sqrt(3) / 2
        uniform(np.arctan2(sine, cosine) / (2 * np.pi), -op.hue, op.hue)
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (0.4, 0.4, 0.2, 0.1)

    sizes = np.full((len(ids), 2), 100_000)  # so large that no box is rounded, and hardly one does not fit
    start, end = (corner.astype(float) for corner in crop.parameters(drawn(crop), sizes, 224))
    height, width = (end - start).T
    area, aspect = height * width / 1e10, np.log(width / height)
    fits = area <= 0.75  # a box of any aspect in the range
    uniform(area[fits], 0.08, 0.75)
    uniform(aspect[fits], np.log(3 / 4), np.log(4 / 3))
    for axis, side in ((0, height), (1, width)):
        uniform((start[:, axis] / (100_000 - side + 1))[fits], 0, 1)

    windows = blur.model_copy(update={"probability": 1.0}).parameters(drawn(blur), sizes, 224)[0]
    middle = np.array([(w[0, w.shape[1] // 2], w[0, w.shape[1] // 2 + 1]) for w in windows], dtype=float)
    seen = middle[:, 1] > 1e-6  # of a narrower one float32 has no second weight
    sigma = 1 / np.sqrt(2 * np.log(middle[seen, 0] / middle[seen, 1]))
    smallest = 1 / np.sqrt(2 * np.log(1e6))
    uniform(sigma, max(0.1, smallest), 2.0)
    assert blur.sigma == (0.1, 2.0)

    affine = augment.Affine(op="affine", degrees=30, translate=0.1, scale=(0.5, 1.5))
    square = np.full((len(ids), 2), 200)
    matrix = affine.parameters(drawn(affine), square, 224)[0].astype(float)
    uniform(np.rad2deg(np.arctan2(matrix[:, 0, 1], matrix[:, 0, 0])), -30, 30)
    uniform(np.sqrt(1 / np.linalg.det(matrix[:, :, :2])), 0.5, 1.5)
    shown = np.linalg.solve(matrix[:, :, :2], (100 - matrix[:, :, 2])[..., None])[..., 0]  # where the centre goes
    for axis in (0, 1):
        uniform(shown[:, axis] - 100, -20, 20)


def test_four_views_of_a_picture_are_independent() -> None:
    ids = np.arange(10_000)
    draws = [randomness.uniforms(7, 3, ids, view, 33) for view in range(4)]
    for a, b in itertools.combinations(draws, 2):
        found = np.corrcoef(a.T, b.T)[:33, 33:]
        assert np.abs(found).max() < 5.2 / np.sqrt(len(ids))  # 6 x 33 x 33 numbers: one time in a thousand
