"""What an op expects of its arguments, said before anything is launched. For use in @constexpr functions."""


def expect_type(op, argument, dtype, *expected):
    """dtype: a MindSpore type; expected: names of types. Raises ValueError."""
    if str(dtype).lower() not in expected:
        raise ValueError(f"{op}: {argument} is {str(dtype).lower()}, expected {' or '.join(expected)}.")


def expect_shape(op, argument, shape, expected, legend):
    """A size None is not known while a graph is compiled, or not fixed; the others have to agree. Raises ValueError."""
    if len(shape) != len(expected) or any(None not in pair and pair[0] != pair[1]
                                          for pair in zip(shape, expected, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{op}: {argument} has shape {list(shape)}, expected [{wanted}], {legend}.")


def expect_at_least(op, argument, value, minimum, what):
    """value None: not known while a graph is compiled. Raises ValueError."""
    if value is not None and value < minimum:
        raise ValueError(f"{op}: {argument} has {value} {what}, expected at least {minimum}.")


def known_values(tensor):
    """The tensor's values as an array, or None: a graph is being compiled and it is no constant."""
    if tensor is None or getattr(tensor, "created_empty_tensor", False):
        return None
    return tensor.asnumpy()
