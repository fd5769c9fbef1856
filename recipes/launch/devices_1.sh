#!/bin/sh
# One NPU: no launcher. sh recipes/launch/devices_1.sh recipe=sft_reasoning scale=1b ...
# (Not run on a device by the authors.)
exec python -m mindpangu.train run=ascend "$@"
