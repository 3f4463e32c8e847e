"""An engine of another package: transformers again, with weights that it reads itself."""

from bitassay.engines.engine import TransformersEngine
from bitassay.engines.load import load
from bitassay.models.identity import identity


class Other(TransformersEngine):
    """Runs the folder of a model that comes without weights."""

    def __init__(self, model):
        super().__init__(load(identity(model).source.folder))

    def numerics(self):
        return super().numerics() | {"engine": "other", "engine_version": "1"}
