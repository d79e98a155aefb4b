"""Mergers of one's own: what they are asked, and what is said when they give something wrong."""

import pytest
import timm
import torch

import tdm_lightning as tdm
from tdm_lightning.core import Seen


def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=64).eval()  # 16 patches


class Halves(tdm.Merger):
    """Neighbours in the sequence become their mean; ``change`` spoils what it gives."""

    def __init__(self, change=None):
        self.change = change

    def __call__(self, seen, keep):
        n = seen.x.shape[1]
        group = (torch.arange(n) * keep // n).expand(len(seen.x), -1)
        one_hot = torch.nn.functional.one_hot(group, keep).float() * seen.size.unsqueeze(-1)
        size = one_hot.sum(1)
        x = (one_hot / size.unsqueeze(1)).transpose(1, 2) @ seen.x
        found = tdm.Reduction(x, group, torch.full_like(group, int(tdm.Role.MATCHED)), size)
        return found if self.change is None else self.change(found)


def spoiled(**changes):
    import dataclasses

    return lambda found: dataclasses.replace(
        found, **{name: change(getattr(found, name)) for name, change in changes.items()}
    )


@torch.no_grad()
def test_an_own_merger_works_wherever_tokens_are_given_up():
    images = torch.randn(2, 3, 64, 64)
    strategies = [
        tdm.TDM(0.5, (1, 3), Halves()),
        tdm.EViT(0.5, (1, 3), merger=Halves()),
        tdm.TopK(0.5, (1, 3), Halves()),
        tdm.Random(0.5, (1, 3), merger=Halves()),
        tdm.ToMe(2, merger=Halves()),
        tdm.DPCKNN(0.5, (1, 3), merger=Halves()),
        tdm.DyViT(0.5, (1, 3), Halves()),
        tdm.SPViT((1, 3), (0.5, 0.25), Halves(), fixed_count=True),
    ]
    for strategy in strategies:
        logits, trace = tdm.attach(vit(), strategy).trace(images)
        assert logits.isfinite().all()
        counts = [14, 12, 10, 8, 6, 4] if isinstance(strategy, tdm.ToMe) else [16, 8, 8, 4, 4, 4]
        if not isinstance(strategy, tdm.ToMe):
            assert trace.token_counts[-1] == 4
        else:
            assert trace.token_counts == counts
        held = trace.layers[-1].assignment
        assert (held >= 0).all()
    model = tdm.attach(
        timm.create_model("test_vit", img_size=64, global_pool="avg").eval(),
        tdm.EvoViT(0.5, layers=(1, 3), merger=Halves()),
    )
    assert model.trace(images)[1].token_counts == [16] + [8] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoiled(x=lambda x: x[:, 1:]), r"block 1 was to make 8 of 16.*x of shape \(2, 8, 64\)"),
        (spoiled(x=lambda x: x[..., 1:]), r"expected x of shape \(2, 8, 64\), found \(2, 8, 63\)"),
        (spoiled(assignment=lambda a: a[:, 1:]), r"assignment of shape \(2, 16\), found \(2, 15\)"),
        (spoiled(assignment=lambda a: a.float()), "assignment of type int64, found torch.float32"),
        (spoiled(assignment=lambda a: a + 8), "assignment from -1 .dropped. to 7, found 8 to 15"),
        (spoiled(size=lambda s: s[:, 1:]), r"size of shape \(2, 8\), found \(2, 7\)"),
        (spoiled(size=lambda s: s / 0), "16 in size that are not; a weight may have been divided"),
        (spoiled(x=lambda x: x * torch.nan), "found 1024 in x that are not"),
        (lambda found: found.x, "gave a Tensor, expected a Reduction"),
    ],
)
def test_what_is_wrong_is_named_with_block_expected_and_found(change, message):
    model = tdm.attach(vit(), tdm.TDM(0.5, (1,), Halves(change)))
    with pytest.raises(tdm.errors.ReductionError, match=f"Halves in block 1.*{message}|{message}"):
        model(torch.randn(2, 3, 64, 64))


def test_tokens_that_were_not_finite_before_are_not_the_mergers_fault():
    model = tdm.attach(vit(), tdm.TDM(0.5, (1,), Halves()))
    assert model(torch.full((1, 3, 64, 64), torch.nan)).isnan().all()


def test_words_that_nobody_knows_and_things_that_are_not_there():
    class Asks(Halves):
        def requires(self):
            return frozenset({"values"})

    with pytest.raises(ValueError, match=r"Asks.requires\(\) asks for 'values'; a merger can see"):
        tdm.TDM(merger=Asks())
    with pytest.raises(ValueError, match=r"merges before a block.*asks for 'keys'"):
        tdm.DyViT(merger=tdm.PairMerger())
    with pytest.raises(TypeError, match="abstract"):
        tdm.Merger()


def test_a_merger_that_cannot_leave_so_few_is_refused_at_once():
    with pytest.raises(ValueError, match="leaves at least 8 of 16 tokens in one block, and 4 are"):
        tdm.attach(vit(), tdm.TDM(0.25, (1,), tdm.PairMerger()))


def test_sizes_are_followed_for_mergers_that_read_them():
    assert tdm.TDM(merger=Halves()).requires().sizes
    assert not tdm.TopK().requires().sizes
    assert not tdm.EViT().requires().sizes
    seen = []

    class Looks(Halves):
        def __call__(self, given, keep):
            seen.append(given.size)
            return super().__call__(given, keep)

    tdm.attach(vit(), tdm.TDM(0.5, (1, 3), Looks()))(torch.randn(1, 3, 64, 64))
    assert seen[0].tolist() == [[1.0] * 16]
    assert seen[1].tolist() == [[2.0] * 8]


@pytest.mark.parametrize(
    "merger", [tdm.Drop(), tdm.Fuse(), tdm.Cluster(), tdm.PairMerger(), tdm.TokenMerger()], ids=str
)
def test_the_librarys_own_keep_their_promises(merger):
    x, importance = torch.randn(2, 12, 6), torch.rand(2, 12)
    seen = Seen(x, torch.ones(2, 12), importance, torch.randn(2, 12, 4), prefix=1)
    found = merger(seen, 8)
    assert found.x.shape == (2, merger.leaving(8), 6)
    assert found.assignment.max() < merger.leaving(8)
    assert type(tdm.Merger.from_config(merger.config())) is type(merger)
    assert merger.config()["class_path"] == f"tdm_lightning.{type(merger).__name__}"
