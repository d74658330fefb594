"""What holds for any data, split, order, augmentation and embeddings: properties that hypothesis tries to break."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from worker import LOSSES

from datamodules.arrays import ImageSet, random_split, read_npz
from datamodules.labels import select_classes
from datamodules.loader import BatchLoader
from errors import InputError

settings.register_profile(
    "calm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("calm")

labels_of = st.lists(st.integers(0, 5), min_size=2, max_size=120).map(torch.tensor)


@given(st.integers(2, 200), st.data())
def test_a_split_is_a_partition(count, data):
    size, seed = data.draw(st.integers(1, count - 1)), data.draw(st.integers(0, 2**31))
    rest, held_out = random_split(count, size, seed)
    assert torch.cat([rest, held_out]).sort().values.tolist() == list(range(count))
    assert len(held_out) == size and rest.equal(rest.sort().values) and held_out.equal(held_out.sort().values)
    again = random_split(count, size, seed)
    assert rest.equal(again[0]) and held_out.equal(again[1])


@given(labels_of, st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
def test_selected_classes_are_numbered_in_the_order_given(labels, classes):
    images = torch.arange(len(labels))
    chosen = select_classes(ImageSet(images, labels), classes)
    assert chosen.images.tolist() == [i for i, label in enumerate(labels.tolist()) if label in classes]
    assert [classes[k] for k in chosen.labels.tolist()] == labels[chosen.images].tolist()


def numbered(count):
    """Images of which the first byte pair tells the number, and labels that do too."""
    images = torch.zeros(count, 32, 32, 3, dtype=torch.uint8)
    images[:, 16, 16, 0] = torch.arange(count)
    return images, torch.arange(count)


@given(
    st.integers(4, 40),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 3),
    st.integers(0, 2**31),
    st.booleans(),
    st.integers(0, 3),
    st.integers(0, 12),
)
@settings(max_examples=60)
def test_processes_see_together_what_one_sees(count, world_size, share, epoch, seed, flip, translate, cutout):
    batch_size = world_size * share
    options = dict(batch_size=batch_size, seed=seed, flip=flip, translate=translate, cutout=cutout)
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
    loaders = [BatchLoader(images, torch.arange(count), **options)]
    loaders += [
        BatchLoader(images, torch.arange(count), **options, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for loader in loaders:
        loader.set_epoch(epoch)
    alone, *ranks = ([*loader] for loader in loaders)
    seen = [label for _, labels in alone for label in labels.tolist()]
    assert len(seen) == len(set(seen)) == count // batch_size * batch_size
    assert all(len(rank) == len(alone) for rank in ranks)
    for batch, slices in zip(alone, zip(*ranks)):
        for whole, parts in zip(batch, zip(*slices)):
            assert torch.cat(parts).equal(whole)


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 20))
def test_an_evaluation_counts_every_image_once(count, world_size, batch_size):
    loaders = [BatchLoader(*numbered(count), batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    batches = [batch for loader in loaders for batch in loader]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(count))
    assert len({len(loader) for loader in loaders} - {len(loaders[0]), len(loaders[0]) - 1}) == 0
    for images, labels in batches:
        assert (images[:, 0, 16, 16] * 255).round().long().equal(labels)


@given(st.integers(4, 40), st.integers(1, 6), st.data())
@settings(max_examples=40)
def test_an_epoch_goes_on_behind_any_batch(count, batch_size, data):
    def loader():
        made = BatchLoader(*numbered(count), min(batch_size, count), seed=3, flip=True, translate=1)
        made.set_epoch(2)
        return made

    whole = [*loader()]
    stopped_after = data.draw(st.integers(1, len(whole)))
    first, second = loader(), loader()
    iterator = iter(first)
    for _ in range(stopped_after):
        next(iterator)
    second.load_state_dict(first.state_dict())
    rest = [*second]
    assert len(rest) == len(whole) - stopped_after
    for (images, labels), (others, other_labels) in zip(rest, whole[stopped_after:]):
        assert images.equal(others) and labels.equal(other_labels)


@given(st.integers(0, 2**31), st.integers(0, 4), st.booleans(), st.integers(0, 3))
@settings(max_examples=25)
def test_an_augmented_image_is_the_image_moved_and_mirrored(seed, translate, flip, epoch):
    images = np.random.default_rng(seed).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    loader = BatchLoader(torch.from_numpy(images), torch.arange(4), 4, seed=seed, flip=flip, translate=translate)
    loader.set_epoch(epoch)
    ((batch, labels),) = loader
    for augmented, label in zip(batch, labels.tolist()):
        pixels = (augmented * 255).round().byte().permute(1, 2, 0).numpy()
        padded = np.pad(images[label], ((translate, translate), (translate, translate), (0, 0)), mode="reflect")
        steps = range(2 * translate + 1)
        crops = [padded[y : y + 32, x : x + 32] for y in steps for x in steps]
        assert any(
            np.array_equal(pixels, way) for crop in crops for way in ((crop, crop[:, ::-1]) if flip else (crop,))
        )


@pytest.mark.parametrize("name", [name for name in LOSSES if "random" not in name])
@given(
    seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 1.0, 1e3]), classes=st.integers(1, 6), same=st.booleans()
)
@settings(max_examples=15)
def test_a_loss_does_not_depend_on_order_or_names_and_has_a_finite_gradient(name, seed, scale, classes, same):
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(14, 8, generator=generator, dtype=torch.float64)
    if same:  # images that are exactly alike, of one class and of two
        z[1:4] = z[0]
    z.requires_grad_()
    labels = torch.randint(classes, (14,), generator=generator)
    loss = LOSSES[name]().double()
    value = loss(z, labels, generator)
    value.backward()
    assert value.isfinite() and value >= 0 and z.grad.isfinite().all()
    order, names = torch.randperm(14, generator=generator), torch.randperm(classes, generator=generator) + 100
    with torch.no_grad():
        # The distance of two images alike is the root of a rounding error; whether a tie is semihard, rounding decides.
        if not (same and "semihard" in name):
            torch.testing.assert_close(loss(z[order], labels[order], generator), value.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(loss(z, names[labels], generator), value.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_embeddings_without_length_have_a_bounded_gradient(name, size, dtype):
    labels = torch.arange(size) % (size // 2)
    same = [0, size // 2]  # of one class
    for rows, scale in ((same[:1], 0), (same, 0), ([0, 1], 0), (range(size), 0), (same, 1e-20), (range(size), 1e-20)):
        z = torch.randn(size, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        z[list(rows)] *= scale
        value = LOSSES[name]().to(dtype)(z.requires_grad_(), labels, torch.Generator().manual_seed(0))
        value.backward()
        assert value.isfinite() and z.grad.norm(dim=1).max() < 1e4, (rows, scale)


DTYPES = {"images": [np.uint8, np.int8, np.float32, np.bool_], "labels": [np.int64, np.uint8, np.float64, np.complex64]}


@given(
    images=arrays_of.arrays(st.sampled_from(DTYPES["images"]), arrays_of.array_shapes(max_dims=5, max_side=4)),
    labels=arrays_of.arrays(
        st.sampled_from(DTYPES["labels"]), arrays_of.array_shapes(max_dims=2, max_side=4), fill=st.just(0)
    ),
    fitting=st.booleans(),
)
def test_any_arrays_are_read_as_they_are_or_refused(tmp_path, images, labels, fitting):
    if fitting:
        images = np.resize(images, (len(labels), 32, 32, 3))
    path = tmp_path / "any.npz"
    np.savez(path, images=images, labels=labels)
    good = images.dtype == np.uint8 and images.ndim == 4 and images.shape[1:] == (32, 32, 3) and labels.ndim == 1
    good = good and np.issubdtype(labels.dtype, np.integer) and len(labels) == len(images)
    if good and ((labels >= 0) & (labels < 10)).all():
        found = read_npz(path, 10)
        assert np.array_equal(found.images, images) and np.array_equal(found.labels, labels)
    else:
        with pytest.raises(InputError, match="any.npz: "):
            read_npz(path, 10)
