"""Extends a model's window by changing the parameters of its rotary embeddings."""

KEPT_ACROSS_TYPES = ("rope_theta", "partial_rotary_factor")
SCALED_FROM_ORIGINAL = ("yarn", "longrope", "llama3")


def set_window(config, rope_parameters, max_position_embeddings):
    """Merges `rope_parameters` into the config's own and sets its `max_position_embeddings`.

    Parameters that are not given keep the model's values, in particular rope_theta. With yarn, longrope and llama3
    `original_max_position_embeddings` defaults to the positions that the model had, and `max_position_embeddings` to
    that number times the factor.
    """
    config = config.get_text_config()
    if rope_parameters:
        own = getattr(config, "rope_parameters", None) or {}
        positions = getattr(config, "max_position_embeddings", None)
        layer_types = [key for key, value in own.items() if isinstance(value, dict)]
        if layer_types and not rope_parameters.keys() <= set(layer_types):
            raise SystemExit(
                f"This model has rope_parameters per layer type. Pass a dict for each: {' or '.join(layer_types)}."
            )
        if layer_types:
            merged = {key: _merged(own[key], rope_parameters.get(key, {}), positions) for key in layer_types}
        else:
            merged = _merged(own, rope_parameters, positions)
        if max_position_embeddings is None:
            scaled = [
                int(each["factor"] * each["original_max_position_embeddings"])
                for each in (merged.values() if layer_types else [merged])
                if {"factor", "original_max_position_embeddings"} <= each.keys()
            ]
            max_position_embeddings = max(scaled, default=positions)
        config.rope_parameters = merged
    if max_position_embeddings is not None:
        config.max_position_embeddings = max_position_embeddings
    if rope_parameters:
        config.standardize_rope_params()
        config.validate_rope()


def _merged(own, given, positions):
    rope_type = given.get("rope_type", own.get("rope_type", "default"))
    original = {}
    if given and rope_type in SCALED_FROM_ORIGINAL:
        original["original_max_position_embeddings"] = own.get("original_max_position_embeddings", positions)
    if rope_type != own.get("rope_type", "default"):
        own = {key: own[key] for key in KEPT_ACROSS_TYPES if key in own}
    return own | original | given | {"rope_type": rope_type}
