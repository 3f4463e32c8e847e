"""Layers that run more than once: `plan` is what a recipe says of it.

select          which layers are worth a copy
layer_copies    the codes of the copies and the coefficients of the passes
fit             those coefficients by least squares
replicas        gives a model its copies
passes          the forward of a layer that has some
controls        the plain recipes that a replicated one has to beat
on_demand       residual planes, read as deep as a token deserves
"""
