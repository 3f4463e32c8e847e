"""The tokens of a model, without its weights."""

from bitassay.audit.wire import Vocabulary
from bitassay.models.config import read_config
from bitassay.models.identity import Identity
from bitassay.models.load import read_tokenizer
from bitassay.models.source import resolve
from bitassay.record.progress import Progress, silent


def words_of(
    model: str, progress: Progress = silent, *, trust_remote_code: bool = False
) -> tuple[Vocabulary, str]:
    """Return the vocabulary of a model that `bitassay.load` finds, and the digest of its tokenizer. Raises
    BitassayError where there is none."""
    source = resolve(model, progress)
    config = read_config(source.folder, trust_remote_code=trust_remote_code).get_text_config()
    tokenizer = read_tokenizer(source.folder, trust_remote_code)
    size = max(int(config.vocab_size), len(tokenizer))
    return Vocabulary(tokenizer, size), Identity(source).tokenizer_digest
