"""Few-shot images: honest tasks, uniform draws, the same images however they are kept."""

import pickle

import numpy as np
import pytest
import torch

import bayesmeta as bm
from bayesmeta.errors import DataError, EmptyTaskError, OptionError, ShapeError
from bayesmeta.tasks import image_store

CLASSES, EACH, SIDE = 12, 7, 4


def marked(classes=CLASSES, each=EACH, side=SIDE, channels=1):
    """8-bit images whose first pixels say class and number: [c, i, 0, …]; the corner stays there alone unturned."""
    images = torch.zeros(classes, each, channels, side, side, dtype=torch.uint8)
    images[:, :, 0, 0, 0] = 1 + torch.arange(classes, dtype=torch.uint8)[:, None]
    images[:, :, 0, 0, 1] = 1 + torch.arange(each, dtype=torch.uint8)
    return images


def read(part, image_shape):
    """Class, number and rotation of each image of a part, and whether its marks are where they belong."""
    images = part.x.unflatten(-1, image_shape)[..., 0, :, :]
    found = torch.full((3, *part.y.shape), -1.0)
    for turns in range(4):
        back = torch.rot90(images, -turns, (-2, -1))
        here = (back[..., 0, 0] > 0) & (back[..., 0, 1] > 0)
        values = torch.stack([back[..., 0, 0] - 1, back[..., 0, 1] - 1, torch.full(part.y.shape, float(turns))])
        found = torch.where(here, values, found)
    assert (found >= 0).all()
    return found.round().long()


def both(batch, image_shape):
    support, query = (read(part, image_shape) for part in (batch.support, batch.query))
    return torch.cat([support, query], -1), torch.cat([batch.support.y, batch.query.y], -1)


@pytest.mark.parametrize("rotations", [False, True])
def test_labels_belong_to_classes_and_no_image_is_in_both(rotations):
    tasks = bm.tasks.ImageClasses(marked(channels=2), ways=3, rotations=rotations, scale=1.0)
    batch = tasks.sample(200, support=6, query=9, generator=0)
    assert batch.support.x.shape == (200, 6, 2 * SIDE * SIDE)
    assert batch.query.y.shape == (200, 9)
    assert batch.support.y.dtype == torch.int64
    assert batch.support.y[0].bincount().tolist() == [2, 2, 2]
    assert batch.query.y[0].bincount().tolist() == [3, 3, 3]
    (classes, number, turns), labels = both(batch, tasks.image_shape)
    kind = classes + CLASSES * turns
    same_label, same_kind = (v.unsqueeze(-1) == v.unsqueeze(-2) for v in (labels, kind))
    assert torch.equal(same_label, same_kind)  # one class, one label, in support and query alike
    image = kind * EACH + number
    assert all(len(row.unique()) == 15 for row in image)
    assert (turns.unique().tolist() == [0, 1, 2, 3]) == rotations
    if rotations:  # a turned class is another: some tasks have one image's class under two labels
        assert not torch.equal(same_label, classes.unsqueeze(-1) == classes.unsqueeze(-2))


def chi_square(values, cells):
    """Over its degrees of freedom, standardised: normal for a uniform law."""
    counts = torch.bincount(values.flatten(), minlength=cells).double()
    expected = counts.sum() / cells
    return float(((counts - expected).square().sum() / expected - (cells - 1)) / (2 * (cells - 1)) ** 0.5)


def test_classes_labels_and_images_are_uniform():
    """Counts of classes drawn without replacement vary less than of independent ones: the statistic is one-sided."""
    tasks = bm.tasks.ImageClasses(marked(), ways=3, rotations=True, scale=1.0)
    batch = tasks.sample(20_000, support=3, query=3, generator=1)
    (classes, number, turns), labels = both(batch, tasks.image_shape)
    one = slice(0, 1)  # one image of each task: independent
    kind = (classes + CLASSES * turns)[:, one]
    assert abs(chi_square(kind, 4 * CLASSES)) < 4.5
    assert abs(chi_square(number[:, one], EACH)) < 4.5
    assert abs(chi_square(number[:, 3:4], EACH)) < 4.5  # of a query
    pair = number[:, 0] * EACH + number[:, 3]  # images of one class in support and query: all pairs but equal ones
    cells = torch.bincount(pair, minlength=EACH * EACH).reshape(EACH, EACH)
    assert cells.diagonal().sum() == 0
    assert abs(chi_square(number[:, 3] - number[:, 0] - 1 + EACH * (number[:, 3] < number[:, 0]), EACH - 1)) < 4.5
    skewed = torch.where(torch.rand(kind.shape, generator=torch.Generator().manual_seed(0)) < 0.1, 0, kind)
    assert chi_square(skewed, 4 * CLASSES) > 20  # the control
    # a class has each label equally often, so that a label tells nothing
    of_class_3 = labels.reshape(-1, 6)[:, :3][(classes[:, :3] == 3)]
    assert abs(chi_square(of_class_3, 3)) < 4.5


def test_classes_of_several_sizes():
    """Each image of its own class equally likely; the smallest class bounds what may be asked for."""
    images = [marked()[c, : 2 + c] for c in range(5)]
    tasks = bm.tasks.ImageClasses(images, ways=2, scale=1.0)
    batch = tasks.sample(20_000, support=2, query=2, generator=0)
    (classes, number, _), _ = both(batch, tasks.image_shape)
    for c in range(5):
        numbers = number[:, 0][classes[:, 0] == c]
        assert int(numbers.max()) == 1 + c
        assert abs(chi_square(numbers, 2 + c)) < 4.5
    with pytest.raises(EmptyTaskError, match="Class '0' has 2 image"):
        tasks.sample(1, support=4, query=2)


def test_the_same_seed_gives_the_same_bits():
    tasks = bm.tasks.ImageClasses(marked(), rotations=True)
    a, b, c = (tasks.sample(8, support=5, query=10, generator=seed) for seed in (3, 3, 4))
    assert torch.equal(a.support.x, b.support.x)
    assert torch.equal(a.query.x, b.query.x)
    assert not torch.equal(a.support.x, c.support.x)
    again = pickle.loads(pickle.dumps(tasks)).sample(8, support=5, query=10, generator=3)
    assert torch.equal(a.support.x, again.support.x)


def test_rotations_are_torchs():
    pixels = torch.randint(256, (1, 1, 3, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tasks = bm.tasks.ImageClasses(pixels, ways=4, rotations=True)
    batch = tasks.sample(1, support=4, query=0, generator=0)
    found = {tuple(image.tolist()) for image in batch.support.x[0]}
    turned = [torch.rot90(pixels[0, 0], turns, (1, 2)).flatten().float() / 255 for turns in range(4)]
    assert found == {tuple(image.tolist()) for image in turned}
    assert len(found) == 4


# -- where images are ---------------------------------------------------------------------------------------------


def kept(kind, tmp_path):
    images = marked()
    if kind == "float":
        return bm.tasks.ImageClasses(images.float() / 255)
    if kind == "numpy":
        return bm.tasks.ImageClasses(images.numpy())
    if kind == "labels":
        shuffle = torch.randperm(CLASSES * EACH, generator=torch.Generator().manual_seed(0))
        # argsort is stable: within a class, images stand in the order in which they were given
        shuffle = shuffle[(shuffle % EACH).argsort(stable=True)]
        labels = torch.arange(CLASSES).repeat_interleave(EACH)
        return bm.tasks.ImageClasses.from_labels(images.flatten(0, 1)[shuffle], labels[shuffle])
    if kind == "folder":
        from PIL import Image

        for c, i in np.ndindex(CLASSES, EACH):
            folder = tmp_path / f"alphabet{c // 5}" / f"class{c:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[c, i, 0].numpy()).save(folder / f"{i}.png")
        return bm.tasks.ImageClasses.from_folder(tmp_path, grey=True)
    np.save(tmp_path / "images.npy", images.numpy())
    return bm.tasks.ImageClasses(np.load(tmp_path / "images.npy", mmap_mode="r"))


@pytest.mark.parametrize("kind", ["float", "numpy", "labels", "folder", "memmap"])
def test_however_images_are_given_the_batches_are_the_same(kind, tmp_path):
    ours = kept(kind, tmp_path).sample(4, support=5, query=10, generator=0)
    theirs = bm.tasks.ImageClasses(marked()).sample(4, support=5, query=10, generator=0)
    assert torch.equal(ours.support.y, theirs.support.y)
    torch.testing.assert_close(ours.query.x, theirs.query.x, rtol=1e-6, atol=0)
    assert ours.query.x.max() > 0


def test_a_memory_map_stays_on_disk(tmp_path):
    tasks = kept("memmap", tmp_path)
    tasks.sample(2, support=5, query=5)
    assert isinstance(tasks._store.pixels, np.memmap)
    assert tasks._store._moved == {}


def test_images_go_to_a_gpu_where_they_fit(monkeypatch):
    store = image_store.Store(torch.zeros(10, 100, dtype=torch.uint8), "auto")
    gpu = torch.device("cuda", 0)
    for free, fits in ((2000, True), (1999, False)):
        monkeypatch.setattr(image_store, "free_bytes", lambda device, free=free: free)
        assert store._is_moved(gpu) is fits
    assert image_store.Store(store.pixels, "device")._is_moved(gpu)
    assert not image_store.Store(store.pixels, "host")._is_moved(torch.device("cpu"))


def test_parts_have_classes_of_their_own_and_share_the_images():
    tasks = bm.tasks.ImageClasses(marked(), ways=2, rotations=True, scale=1.0)
    parts = tasks.split([6, 3, 3], seed=0)
    seen = []
    for part in parts:
        (classes, _, _), _ = both(part.sample(300, support=2, query=2, generator=0), part.image_shape)
        assert {str(c) for c in classes.unique().tolist()} == set(part.names)
        assert part._store is tasks._store
        seen += part.names
    assert sorted(seen) == sorted(tasks.names)
    assert parts[0].num_classes == 24
    assert tasks.subset(["3", "1"]).names == ("3", "1")
    mask = torch.arange(CLASSES) < 4
    for masked in (mask, mask.numpy(), mask.tolist(), list(mask.numpy())):
        assert tasks.subset(masked).names == ("0", "1", "2", "3")


# -- training -----------------------------------------------------------------------------------------------------


def conv(channels=1, side=8, ways=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Unflatten(-1, (channels, side, side)),
            torch.nn.Conv2d(channels, 8, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.AvgPool2d(4),
            torch.nn.Flatten(),
            torch.nn.Linear(32, ways),
        )


def quarters(classes=30, each=12):
    """The four quarters of an image of 8×8 are as bright as its class says, under noise."""
    generator = torch.Generator().manual_seed(0)
    level = torch.randint(200, (classes, 1, 1, 2, 2), generator=generator)
    level = level.repeat_interleave(4, -1).repeat_interleave(4, -2)
    return (level + torch.randint(56, (classes, each, 1, 8, 8), generator=generator)).to(torch.uint8)


METHODS = {
    "maml": lambda model: bm.MAML(model, inner_lr=0.4, inner_steps=3),
    "anil": lambda model: bm.ANIL(model, inner_lr=1.0, inner_steps=3),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_conv_net_trains(name):
    tasks = bm.tasks.ImageClasses(quarters(), ways=3)

    method = METHODS[name](bm.NeuralTaskModel(conv(), bm.likelihoods.Categorical(3), "point"))
    bm.fit(method, tasks, steps=30, tasks_per_step=8, support=6, query=6, progress=False, device="cpu",
           optimizer=lambda p: torch.optim.Adam(p, 3e-2))  # fmt: skip
    batch = tasks.sample(50, support=6, query=9, generator=9)
    found = method.adapt(batch.support).class_probabilities(batch.query, 10).argmax(-1)
    assert (found == batch.query.y).double().mean() > 0.75  # by chance a third
    swapped = bm.Observations(batch.support.x, batch.support.y.roll(2, -1))  # a control: wrong labels mislead
    wrong = method.adapt(swapped).class_probabilities(batch.query, 10).argmax(-1)
    assert (wrong == batch.query.y).double().mean() < 0.3


def test_drawing_is_part_of_a_compiled_step(monkeypatch):
    """Numbers of the captured graph equal those of eager steps, and tasks are fresh in each."""
    monkeypatch.setattr("bayesmeta.train.compilation.compiled._inductor", lambda graph, inputs: graph)
    tasks = bm.tasks.ImageClasses(quarters(), ways=3, rotations=True)
    losses = []
    for mode in ("inductor", "off"):
        method = bm.ANIL(bm.NeuralTaskModel(conv(), bm.likelihoods.Categorical(3), "point"), inner_lr=0.1)
        result = bm.fit(method, tasks, steps=5, tasks_per_step=2, support=3, query=3, progress=False, device="cpu",
                        log_every=1, compile=mode, dtype=torch.float64)  # fmt: skip
        losses.append(torch.tensor([entry["loss"] for entry in result.history]))
        if mode == "inductor":
            assert "1 graph(s)" in result.compiled
            assert "tasks drawn in the graph" in result.compiled
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    assert len(losses[0].unique()) == 5


# -- bad input ----------------------------------------------------------------------------------------------------

TWO, OTHER, NONE = torch.zeros(2, 4, 4), torch.zeros(2, 4, 5), torch.zeros(0, 4, 4)
from_labels = bm.tasks.ImageClasses.from_labels
REFUSED = {
    "shape": (lambda: bm.tasks.ImageClasses(torch.zeros(3, 4, 5)), ShapeError, r"\[3, 4, 5\]"),
    "kind": (lambda: bm.tasks.ImageClasses("images"), DataError, "is a str"),
    "dtype": (lambda: bm.tasks.ImageClasses(torch.zeros(9, 2, 4, 4).long()), DataError, "int64"),
    "none": (lambda: bm.tasks.ImageClasses([]), DataError, "No class"),
    "empty": (lambda: bm.tasks.ImageClasses([TWO, NONE]), EmptyTaskError, "Class 1"),
    "unlike": (lambda: bm.tasks.ImageClasses([TWO, OTHER]), ShapeError, r"\(4, 4\), \(4, 5\)"),
    "oblong": (lambda: bm.tasks.ImageClasses(torch.zeros(9, 2, 4, 5), rotations=True), ShapeError, "square"),
    "ways": (lambda: bm.tasks.ImageClasses(marked(3)), OptionError, "there are 3"),
    "no way": (lambda: bm.tasks.ImageClasses(marked(), ways=0), OptionError, "ways=0"),
    "scale": (lambda: bm.tasks.ImageClasses(marked(), scale=0), OptionError, "scale=0"),
    "keep": (lambda: bm.tasks.ImageClasses(marked(), keep="disk"), OptionError, "'disk'"),
    "names": (lambda: bm.tasks.ImageClasses(marked(), names=["a"]), OptionError, "1 names"),
    "labels": (lambda: from_labels(marked()[0], torch.zeros(3).long()), ShapeError, "one for each"),
    "label kind": (lambda: from_labels(marked()[0], torch.zeros(7)), DataError, "whole numbers"),
    "multiple": (lambda: bm.tasks.ImageClasses(marked()).sample(1, support=4, query=5), OptionError, "multiples of 5"),
    "query": (lambda: bm.tasks.ImageClasses(marked()).sample(1, support=5, query=None), OptionError, "query=None"),
    "number": (lambda: bm.tasks.ImageClasses(marked()).sample(0, support=5, query=5), OptionError, "num_tasks=0"),
    "too few": (lambda: bm.tasks.ImageClasses(marked()).sample(1, support=5, query=35), EmptyTaskError, "7 image"),
    "twice": (lambda: bm.tasks.ImageClasses(marked()).subset([1, 1]), DataError, "twice"),
    "mask": (lambda: bm.tasks.ImageClasses(marked()).subset([True, False]), DataError, "by 2 entries, 2 of them"),
    "mask tensor": (lambda: bm.tasks.ImageClasses(marked()).subset(torch.ones(9) > 0), DataError, "by 9 entries"),
    "mask and numbers": (
        lambda: bm.tasks.ImageClasses(marked()).subset([True, *range(1, CLASSES)]), DataError, "1 of them True or False"
    ),
    "unknown": (lambda: bm.tasks.ImageClasses(marked()).subset(["x"]), DataError, "'x'"),
    "split": (lambda: bm.tasks.ImageClasses(marked()).split([9, 3]), OptionError, "there are 3"),
    "too many": (lambda: bm.tasks.ImageClasses(marked()).split([9, 5]), OptionError, "12 classes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(name):
    call, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        call()


def test_folders_that_are_none(tmp_path):
    with pytest.raises(DataError, match="no folder with files"):
        bm.tasks.ImageClasses.from_folder(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.png").write_text("no image")
    with pytest.raises(DataError, match=r"notes.png is no image"):
        bm.tasks.ImageClasses.from_folder(tmp_path, ways=1)
