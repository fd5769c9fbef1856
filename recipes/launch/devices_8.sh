#!/bin/sh
# The eight NPUs of one Atlas 800T A2. sh recipes/launch/devices_8.sh recipe=sft_reasoning scale=1b ...
# (Not run on a device by the authors.)
#
# msrun starts the command once per NPU, and once more as scheduler. It uses --master_port and the port after it.
# What rank 0 says is shown; every rank's output is in log/worker_<rank>.log.
exec msrun --worker_num=8 --local_worker_num=8 --master_port="${MASTER_PORT:-8118}" --join=True --tail_worker_log=0 \
    --log_dir=log --bind_core=True python -m mindpangu.train run=ascend_8 "$@"
