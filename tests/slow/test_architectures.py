"""Every causal architecture of the installed transformers works, or is refused in one line; the docs say which."""

import warnings

import pytest
from transformers.utils import logging

from bitassay.testing.architectures import NOT_BUILT, architectures

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def survey(benchmark):
    return benchmark("architectures")


@pytest.mark.parametrize("model_type", architectures())
def test_works_or_is_refused(survey, model_type):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        found = survey.examine(model_type)
    faults = {step: what for step, what in found.items() if what.startswith("FAULT")}
    assert not faults
    assert survey.documented()[model_type] == survey.row(found)


def test_the_docs_have_every_architecture(survey):
    assert sorted(survey.documented()) == architectures()
    assert len(architectures()) > 60
    text = survey.DOCS.read_text()
    assert all(f"- {name}: {why}" in text for name, why in NOT_BUILT.items())
