import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from datamodules import CIFAR10DataModule, DigitsDataModule
from datamodules.loader import BatchLoader
from errors import InputError
from lightning_modules import SupervisedEncoder
from lightning_modules.encoders import RandomPatches, ReportEncoder
from lightning_modules.encoders.contract import Encoder, build_encoder, channel_statistics, view, view_list
from lightning_modules.encoders.fast import FastEncoder, whitening_filters
from lightning_modules.encoders.torchvision import TorchvisionEncoder
from lightning_modules.losses.functional import multi_negative_loss


def photos(count=200):
    """Smooth random images (N, 32, 32, 3) uint8: neighbouring pixels and channels are correlated, as in photographs."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed = coarse + coarse.mean(1, keepdim=True)
    fine = torch.nn.functional.interpolate(mixed, size=32, mode="bilinear")
    return (fine / 2 * 255).byte().permute(0, 2, 3, 1).contiguous()


def test_channel_statistics_equal_those_of_the_floats():
    images = photos()
    mean, std = channel_statistics(images)
    floats = images.double() / 255
    torch.testing.assert_close(mean.double(), floats.mean((0, 1, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(std.double(), floats.std((0, 1, 2), unbiased=False), rtol=1e-6, atol=0)
    assert channel_statistics(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))[1].tolist() == [1, 1, 1]


def test_whitened_patches_are_uncorrelated_with_unit_variance():
    images = photos().permute(0, 3, 1, 2).float() / 255
    mean, std = images.mean((0, 2, 3)).view(3, 1, 1), images.std((0, 2, 3)).view(3, 1, 1)
    filters = whitening_filters(images, mean, std, eps=1e-9)
    out = torch.nn.functional.conv2d((images - mean) / std, filters).permute(1, 0, 2, 3).flatten(1).double()
    torch.testing.assert_close(out @ out.T / out.shape[1], torch.eye(12, dtype=torch.float64), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    "images", [DigitsDataModule().split("train").images, torch.full((3, 32, 32, 3), 7, dtype=torch.uint8)]
)
def test_grey_and_constant_images_do_not_blow_the_whitening_up(images):
    encoder = FastEncoder()
    encoder.initialize(images)
    assert encoder.whiten.weight.abs().max() <= 1e-2**-0.5 + 1e-4
    assert encoder.eval()(torch.rand(2, 3, 32, 32)).isfinite().all()


def test_grey_images_have_the_same_gradients_in_bfloat16():
    """Channels that never vary would reach each BatchNorm, which multiplies their rounding errors by 1/√eps."""
    data = DigitsDataModule().split("train")
    torch.manual_seed(0)
    encoder = FastEncoder()
    encoder.initialize(data.images)
    images, norms = data.images[:128].permute(0, 3, 1, 2).float() / 255, []
    for enabled in (False, True):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features = encoder(images)
        multi_negative_loss(features.float(), data.labels[:128], 0.1).backward()
        norms.append(torch.stack([p.grad.norm() for p in encoder.parameters() if p.requires_grad]).norm())
    assert 0.5 < norms[1] / norms[0] < 2, norms


@pytest.mark.parametrize(
    "make, width",
    [
        (FastEncoder, 256),
        (lambda: FastEncoder([8, 16, 24]), 24),
        (lambda: FastEncoder([8, 8, 16], residual=True), 16),
        (lambda: FastEncoder([8, 8, 16], all_blocks=True), 160),
        (ReportEncoder, 32),
        (lambda: ReportEncoder(7), 7),
        (lambda: RandomPatches(70), 560),
        (TorchvisionEncoder, 512),
        (lambda: TorchvisionEncoder("torchvision.models.mobilenet_v3_small", stem="imagenet"), 1024),
        (lambda: TorchvisionEncoder("vgg11", stem="imagenet", image_size=64), 4096),
    ],
)
def test_contract_and_rebuilding_from_the_spec(make, width):
    torch.manual_seed(0)
    encoder = make()
    encoder.initialize(photos())
    encoder.eval()
    x = torch.rand(4, 3, 32, 32)
    assert encoder.feature_dim == width and encoder(x).shape == (4, width)
    again = build_encoder(encoder.spec)
    again.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(again.eval()(x), encoder(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [32, 16])
def test_all_blocks_are_averaged_over_nine_parts(size):
    torch.manual_seed(0)
    encoder = FastEncoder([4, 8, 16], pooling="mean", all_blocks=True).eval()
    encoder.initialize(photos())
    x, maps = torch.rand(2, 3, size, size), []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: maps.append(output))
    features = encoder(x)
    parts = [F.adaptive_avg_pool2d(m, 3).flatten(1) for m in maps[:2]]
    torch.testing.assert_close(features, torch.cat([maps[2].mean((2, 3)), *parts], dim=1))
    assert encoder.contrast_dim == 16


def test_random_patches_respond_as_the_definition_says():
    torch.manual_seed(0)
    encoder = RandomPatches(patches=3, size=5, threshold=0.2).eval()
    images = photos()
    encoder.initialize(images)
    x = images[:2].permute(0, 3, 1, 2).float() / 255
    patches = F.unfold(x, 5).transpose(1, 2).double()  # (2, 28 · 28, 75)
    patches = patches - patches.mean(2, keepdim=True)
    patches = patches / (patches.square().mean(2, keepdim=True) + encoder.contrast_eps).sqrt()
    response = patches @ encoder.weight.flatten(1).T.double() + encoder.bias
    response = response.transpose(1, 2).unflatten(2, (28, 28))
    halves = slice(0, 14), slice(14, 28)
    expected = torch.stack([
        (sign * response[:, :, rows, columns] - 0.2).clamp_min(0).mean((2, 3))
        for sign in (1, -1) for rows in halves for columns in halves
    ]).unflatten(0, (2, 4)).permute(2, 0, 3, 1).flatten(1)  # fmt: skip
    torch.testing.assert_close(encoder(x).double(), expected, rtol=1e-3, atol=1e-4)


def test_random_patches_are_whitened():
    torch.manual_seed(0)
    encoder, images = RandomPatches(patches=3, size=5), photos()
    encoder.initialize(images)
    known = F.unfold(images.permute(0, 3, 1, 2).double() / 255, 5, stride=2).transpose(1, 2).flatten(0, 1)
    i, row, column = (int(v) for v in encoder.places[:, 0] * torch.tensor([len(images), 28, 28]))
    own = (images[i, row : row + 5, column : column + 5].permute(2, 0, 1).double() / 255).reshape(1, -1)
    known, own = (
        (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + encoder.contrast_eps).sqrt()
        for x in (known, own)
    )
    variance, directions = torch.linalg.eigh(known.T.cov(correction=0))
    whiten = directions @ torch.diag((variance + encoder.whitening_eps).rsqrt()) @ directions.T
    weight = F.normalize((own - known.mean(0)) @ whiten) @ whiten
    torch.testing.assert_close(encoder.weight[:1].flatten(1).double(), weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(encoder.bias[:1].double(), -weight @ known.mean(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_random_patches_keep_the_type_of_the_module(kind):
    encoder, images = RandomPatches(patches=3), photos()
    encoder.initialize(images)
    x = torch.rand(2, 3, 32, 32)
    expected, found = encoder(x), encoder.to(kind)(x)
    assert found.dtype == kind
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.02)


def test_report_network_has_the_layers_of_the_digest():
    # conv 3→32 and 32→64 of 3×3, linear 4096→1024→512→z_dim
    expected = 32 * 28 + 64 * (32 * 9 + 1) + 1024 * 4097 + 512 * 1025 + 32 * 513
    assert sum(p.numel() for p in ReportEncoder(32).parameters()) == expected


def test_fast_encoder_trains_all_but_whitening_and_batchnorm_scales():
    frozen = {n for n, p in FastEncoder().named_parameters() if not p.requires_grad}
    assert frozen == {"whiten.weight"} | {f"blocks.{b}.{n}.weight" for b in range(3) for n in (2, 5)}


def test_mirror_averaged_features_do_not_change_under_mirroring():
    encoder = FastEncoder().eval()
    encoder.initialize(photos())
    x = torch.rand(4, 3, 32, 32)
    assert not torch.allclose(encoder.embed(x), encoder.embed(x.flip(-1)), atol=1e-3)
    encoder.mirror.fill_(True)
    torch.testing.assert_close(encoder.embed(x), encoder.embed(x.flip(-1)))


def test_shifted_views_are_those_of_an_image_that_moved():
    images = torch.rand(2, 3, 32, 32)
    assert view_list(True, 1) == [(False, 0), (True, 0), (False, 1), (True, 1), (False, -1), (True, -1)]
    assert view_list(False, 0) == [(False, 0)]
    right = view(images, False, 2)
    assert torch.equal(right[..., 2:, 2:], images[..., :-2, :-2]) and torch.equal(
        right[..., 2:, 0], images[..., :-2, 2]
    )  # reflected
    left = view(images, True, -1)
    assert torch.equal(left[..., :-1, :-1], images.flip(-1)[..., 1:, 1:])
    encoder = FastEncoder([8, 8, 8]).eval()
    encoder.shift.fill_(2)
    expected = sum(encoder(view(images, False, moved)) for moved in (0, 2, -2)) / 3
    torch.testing.assert_close(encoder.embed(images), expected)
    torch.testing.assert_close(encoder.embed(images, shifted=False), encoder(images))


def test_the_views_follow_the_augmentation_unless_told():
    def views(data, **options):
        stage = SupervisedEncoder(FastEncoder([8, 8, 8]), **options)
        stage.trainer = SimpleNamespace(datamodule=CIFAR10DataModule(**data))
        stage.initialize(photos(8))
        return stage.encoder.views

    augmented = {"flip": True, "translate": 2}
    assert views(augmented) == view_list(True, 1)
    assert views(augmented, mirror=False, shift=0) == [(False, 0)]
    assert views({"flip": False, "translate": 0}) == [(False, 0)]
    with pytest.raises(InputError, match="model.shift 32"):
        views(augmented, shift=32)


def test_embed_all_is_embed_of_every_image_in_order():
    encoder, images = FastEncoder([8, 8, 8]).eval(), photos(21)
    features = encoder.embed_all(BatchLoader(images, None, 8))
    assert features.shape == (21, 8)
    torch.testing.assert_close(features, encoder.embed(images.permute(0, 3, 1, 2).float() / 255), rtol=1e-4, atol=1e-5)


class Wider(FastEncoder):
    """A subclass of a subclass, whose arguments are given by position."""

    def __init__(self, factor: int, whitening_eps: float = 1e-2) -> None:
        super().__init__([8 * factor] * 3, whitening_eps)


def test_a_subclass_of_a_subclass_is_built_from_its_spec():
    encoder = Wider(2)
    assert encoder.spec == {"class_path": f"{__name__}.Wider", "init_args": {"factor": 2, "whitening_eps": 1e-2}}
    built = build_encoder(copy.deepcopy(encoder).spec)
    assert type(built) is Wider and built.feature_dim == 16


@pytest.mark.parametrize(
    "spec", [{"class_path": "os.system", "init_args": {}}, {"class_path": "FastEncoder", "init_args": {"x": 1}}, None]
)
def test_specs_of_other_programs_are_refused(spec):
    with pytest.raises(InputError):
        build_encoder(spec)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: FastEncoder([1, 2]), "widths of three blocks"),
        (lambda: FastEncoder([0, 1, 1]), "at least 1"),
        (lambda: ReportEncoder(0), "at least 1"),
        (lambda: TorchvisionEncoder("resnet19"), "no such classification model"),
        (lambda: TorchvisionEncoder("fcn_resnet50"), "no such classification model"),
        (lambda: TorchvisionEncoder("vgg11"), "stem: imagenet"),
        (lambda: TorchvisionEncoder("squeezenet1_1", stem="imagenet"), "no linear layer"),
        (lambda: TorchvisionEncoder("alexnet", stem="imagenet"), "image_size: 224"),
        (lambda: TorchvisionEncoder("googlenet", stem="imagenet"), "auxiliary"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weights of the model will change")  # torchvision, of GoogLeNet
def test_impossible_encoders_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_resnet_has_the_stem_for_small_images():
    encoder = TorchvisionEncoder("resnet18")
    assert encoder.net.conv1.weight.shape == (64, 3, 3, 3) and encoder.net.conv1.stride == (1, 1)
    assert encoder.net.layer4(encoder.net.layer3(torch.rand(1, 128, 16, 16))).shape == (1, 512, 4, 4)
    # He et al.'s CIFAR variant has 11.17 million weights without the classifier.
    assert sum(p.numel() for p in encoder.parameters()) == 11_168_832


def test_residual_block_adds_its_input():
    encoder = FastEncoder([4, 4, 4], residual=True).eval()
    shortcut = encoder.blocks[0][4]
    x = torch.rand(2, 4, 6, 6)
    torch.testing.assert_close(shortcut(x), x + shortcut.layers(x))
    assert len(shortcut.layers) == 5 and sum(p.ndim == 4 for p in encoder.blocks.parameters()) == 9


def test_features_do_not_depend_on_the_place_in_the_batch_in_float32():
    images = torch.rand(301, 3, 32, 32).to(memory_format=torch.channels_last)  # odd: threads get uneven shares
    encoder = FastEncoder(widths=[4, 8, 8]).eval().to(memory_format=torch.channels_last)
    order = torch.randperm(301)
    with torch.no_grad():
        assert torch.equal(encoder(images)[order], encoder(images[order]))


class OneConvolution(Encoder):
    """Small, since compiling takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_dim, self.conv, self.norm = 4, torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

    def features(self, images):
        return self.norm(self.conv(images)).relu().mean((2, 3))


@pytest.mark.parametrize("options", [{"channels_last": False}, {"compile_mode": "default"}])
def test_how_an_encoder_runs_changes_rounding_alone(options):
    images, results = torch.rand(6, 3, 32, 32, dtype=torch.float64), []
    for given in ({}, options):
        torch.manual_seed(0)
        encoder = OneConvolution().double().run_as(**given)
        trained = copy.deepcopy(encoder)
        features = trained(images)
        features.square().sum().backward()
        results.append([features, trained.conv.weight.grad, trained.norm.running_mean, trained.eval()(images)])
        assert torch.equal(encoder.conv.weight, trained.conv.weight) and not encoder.norm.running_mean.any()
        assert list(trained.state_dict()) == list(OneConvolution().state_dict())
        assert trained.conv.weight.is_contiguous(memory_format=torch.channels_last) == given.get("channels_last", True)
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


def test_a_machine_without_compiler_is_told_so(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    torch._dynamo.reset()
    encoder = FastEncoder(widths=[4, 8, 8]).run_as(compile_mode="default")
    with pytest.raises(InputError, match="model.compile_mode: this encoder cannot be compiled here"):
        encoder(torch.rand(6, 3, 32, 32))
    encoder.eval()(torch.rand(6, 3, 32, 32))
