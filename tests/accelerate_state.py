from accelerate.state import AcceleratorState, GradientState, PartialState


def fresh_accelerate():
    """Forgets accelerate's process-wide state, so that one worker can serve many set-ups."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
