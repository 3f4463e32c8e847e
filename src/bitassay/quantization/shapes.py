"""Shapes that many signatures share."""

from jaxtyping import Float, Int
from torch import Tensor

Matrix = Float[Tensor, "out in"]
Columns = Float[Tensor, " in"]  # a number for each column of a matrix, such as its importance
Hessian = Float[Tensor, "in in"]  # sum x x^T over the inputs of a matrix
PerGroup = Float[Tensor, "rows groups"]  # a number for each group of weights, such as its scale
Tokens = Int[Tensor, "samples tokens"]
