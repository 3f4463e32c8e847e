from bitassay import _callable_package

_callable_package(__name__, "bitassay.quantize.pipeline:quantize")
