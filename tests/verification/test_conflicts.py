"""Two signed answers to one request prove that the key equivocated; nothing else does."""

import json
from dataclasses import replace

import pytest

from bitassay.cli import run
from bitassay.verification.container import TraceError
from bitassay.verification.receipts.conflicts import Conflict, check_conflict, conflicts
from bitassay.verification.receipts.receipt import SIGNED, commit, write_receipt
from verification.receipts import KEY, OTHER_KEY, refused, signed


def part(header, of, **update):
    return {of: getattr(header, of).model_copy(update=update)}


@pytest.fixture
def answers(receipt):
    """Other answers to the same request, as the host would sign them."""
    header, root = receipt.header, replace(receipt, root=bytes(32))
    return {
        "states": replace(root, signature=KEY.sign(SIGNED + root.commitment)),
        "output_ids": signed(receipt, output_ids=(*header.output_ids[:-1], header.output_ids[-1] ^ 1)),
        "numerics": signed(receipt, **part(header, "numerics", threads=7)),
        "model": signed(receipt, **part(header, "model", name="another name")),
        "sampling": signed(receipt, **part(header, "sampling", seed=9)),
        "layers": signed(receipt, layers=(8, 16)),
    }


@pytest.fixture
def others(receipt):
    """Receipts that have nothing to do with it."""
    header = receipt.header
    return {
        "a copy": receipt,
        "another key": commit_again(receipt, OTHER_KEY),
        "another nonce": signed(receipt, nonce="x"),
        "another prompt": signed(receipt, prompt_ids=(1, *header.prompt_ids[1:-1], 7)),
        "another length": signed(receipt, **part(header, "sampling", max_new_tokens=40)),
        "a sampler": signed(receipt, **part(header, "sampling", sampler="gumbel-max", temperature=1.0)),
        "other weights": signed(receipt, **part(header, "model", weights_digest="0" * 64)),
        "other configuration": signed(receipt, **part(header, "model", config_digest="0" * 64)),
        "another recipe": signed(receipt, **part(header, "model", recipe_id="0" * 64)),
    }


def commit_again(receipt, key):
    return signed(replace(receipt, root=bytes(32)), key)


def test_two_answers_to_one_request_are_a_conflict(receipt, answers):
    for name, other in answers.items():
        for pair in ([receipt, other], [other, receipt, receipt, other]):
            (found,) = conflicts(pair)
            assert {found.first, found.second} == {receipt, other}
            assert found.differs == (name,)
            check_conflict(found)


def test_anything_else_is_none(receipt, others):
    assert conflicts([receipt, *others.values()]) == []
    for other in others.values():
        refused("no-conflict", check_conflict, Conflict(receipt, other))


def test_seeds_count_where_tokens_are_drawn(sampled):
    receipt = commit(sampled, KEY)
    other = signed(receipt, **part(receipt.header, "sampling", seed=6))
    assert conflicts([receipt, other]) == []
    again = signed(receipt, output_ids=(5, *receipt.header.output_ids[1:]))
    assert len(conflicts([receipt, other, again])) == 1


def test_nobody_can_be_framed(receipt, answers):
    """A conflict needs two signatures of the key itself."""
    for forged in (
        replace(answers["states"], signature=receipt.signature),
        replace(commit_again(receipt, OTHER_KEY), key=receipt.key),
        replace(receipt, root=bytes(32)),
    ):
        for call in (
            lambda one: conflicts([receipt, one]),
            lambda one: check_conflict(Conflict(receipt, one)),
        ):
            with pytest.raises(TraceError) as raised:
                call(forged)
            assert raised.value.code == "bad-signature"


def test_one_conflict_for_each_request(receipt, answers, others):
    several = [receipt, *answers.values(), *others.values(), signed(others["another nonce"], output_ids=(5,))]
    found = conflicts(several)
    assert [one.first.header.nonce for one in found] == [receipt.header.nonce, "x"]


def test_the_command_names_them(receipt, answers, others, tmp_path, capsys):
    write_receipt(tmp_path / "a", receipt)
    write_receipt(tmp_path / "copy", receipt)
    write_receipt(tmp_path / "b", answers["output_ids"])
    write_receipt(tmp_path / "c", others["another nonce"])
    (tmp_path / "bad").write_bytes(
        (tmp_path / "a").read_bytes().replace(b'"' + receipt.header.nonce.encode(), b'"x')
    )

    def check(*names):
        status = run(["receipts", "check", *(str(tmp_path / name) for name in names), "--format", "json"])
        return status, json.loads(capsys.readouterr().out)

    assert check("a", "copy", "c")[0] == 0
    status, said = check("a", "copy", "b", "c")
    assert status == 1
    (conflict,) = said["conflicts"]
    assert conflict["differs"] == ["output_ids"]
    assert sorted([conflict["first"], conflict["second"]]) == [
        [str(tmp_path / "a"), str(tmp_path / "copy")],
        [str(tmp_path / "b")],
    ]
    status, said = check("bad", "c")
    assert status == 1
    assert [row["code"] for row in said["rows"]] == ["bad-signature", "signed"]
    assert run(["receipts", "check", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "answered twice" in capsys.readouterr().out
