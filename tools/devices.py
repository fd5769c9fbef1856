"""What devices can do: devices.yaml beside this file, or a file of the user's."""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import yaml

OWN_FILE = Path(__file__).with_name("devices.yaml")


@dataclass(frozen=True)
class Device:
    """Peaks of one NPU; GB is 1e9 bytes, the meaning of each field stands in devices.yaml."""

    tflops: float
    memory_gib: float
    memory_gbs: float
    launch_ms_per_layer: float = field(default=0.0)
    server_gbs: float = field(default=0.0)
    network_gbs: float = field(default=0.0)
    devices_per_server: int = field(default=1)


def load_device(name, file=None):
    """The Device of that name in a YAML file (devices.yaml). Raises ValueError for what is missing or wrong in it."""
    file = Path(file or OWN_FILE)
    try:
        devices = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: not readable as YAML ({error}); its form is that of {OWN_FILE}.") from error
    if not isinstance(devices, dict) or name not in devices:
        known = ", ".join(map(str, devices)) if isinstance(devices, dict) else "none"
        raise ValueError(f"device {name!r} is not in {file}, which has {known}: choose one, or add it to a copy of the "
                         "file and give that one.")
    values, expected = devices[name], {item.name: item for item in fields(Device)}
    if not isinstance(values, dict):
        raise ValueError(f"{file}: {name} holds {values!r}, expected fields such as tflops: 4.0.")
    problems = [f"unknown field {key}" for key in values if key not in expected]
    problems += [f"{key} is missing" for key, item in expected.items() if item.default is MISSING and key not in values]
    for key, value in values.items():
        if key in expected and key != "devices_per_server":
            optional = expected[key].default is not MISSING
            if type(value) not in (int, float) or not (value > 0 or optional and value == 0):
                problems.append(f"{key}: {value!r}, expected a number {'of at least' if optional else 'above'} 0")
    if type(values.get("devices_per_server", 1)) is not int or values.get("devices_per_server", 1) < 1:
        problems.append(f"devices_per_server: {values['devices_per_server']!r}, expected an integer of at least 1")
    if problems:
        raise ValueError(f"{file}: {name}: {'; '.join(problems)}.")
    return Device(**values)
