"""A longer window for a model: its rotary embeddings' parameters, as transformers 5 keeps them."""

KEPT_ACROSS_TYPES = ("rope_theta", "partial_rotary_factor")
SCALED_FROM_ORIGINAL = ("yarn", "longrope", "llama3")


def set_window(config, rope_parameters, max_position_embeddings):
    """Merges `rope_parameters` into the config's own, and sets the positions that it is for.

    What a configuration does not repeat stays the model's: its rope_theta, or what it was scaled by. With yarn,
    longrope and llama3 `original_max_position_embeddings` is what the model had, and without
    `max_position_embeddings` the new window is that times the factor.
    """
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if rope_parameters:
        own = getattr(config, "rope_parameters", None) or {}
        layer_types = [key for key, value in own.items() if isinstance(value, dict)]
        if unknown := [key for key in rope_parameters if layer_types and key not in layer_types]:
            raise SystemExit(
                f"rope_parameters of this model are by layer type: put {', '.join(unknown)} under "
                f"{' or '.join(layer_types)}."
            )
        if layer_types:
            merged = {key: _merged(own[key], rope_parameters.get(key, {}), positions) for key in layer_types}
        else:
            merged = _merged(own, rope_parameters, positions)
        if max_position_embeddings is None:
            scaled = [each for each in (merged.values() if layer_types else [merged]) if each and "factor" in each]
            original = [each.get("original_max_position_embeddings", positions) * each["factor"] for each in scaled]
            max_position_embeddings = int(max(original, default=positions))
        config.rope_parameters = merged
    if max_position_embeddings is not None:
        config.max_position_embeddings = max_position_embeddings
    if rope_parameters:
        config.standardize_rope_params()
        config.validate_rope()


def _merged(own, given, positions):
    if not given:
        return own
    rope_type = given.get("rope_type", own.get("rope_type", "default"))
    if rope_type != own.get("rope_type", "default"):
        own = {key: own[key] for key in KEPT_ACROSS_TYPES if key in own} | {
            "original_max_position_embeddings": own.get("original_max_position_embeddings", positions)
        }
        if rope_type not in SCALED_FROM_ORIGINAL:
            del own["original_max_position_embeddings"]
    return own | given | {"rope_type": rope_type}
