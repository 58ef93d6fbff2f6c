# shellcheck shell=bash
# Environment of AI4Land on MareNostrum 5. Your shell on a login node, Dask's jobs and the sbatch files of this folder source it.
# Values marked (?) come from notes of other users and were not verified on the machine.

AI4LAND_MN5=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export AI4LAND_MN5
export AI4LAND_ENV=$AI4LAND_MN5/env.sh # jobs find this file by it: sbatch passes the environment on

# -- change these, here or in the environment ---------------------------------------------------------------------------
export AI4LAND_VENV=${AI4LAND_VENV:-$(dirname "$AI4LAND_MN5")/venv} # made by install-offline.sh
export AI4LAND_MODULES=${AI4LAND_MODULES-python/3.11.5-gcc}         # (?) see `module avail python`
export AI4LAND_SIF=${AI4LAND_SIF-}                                  # an image built from ai4land.def; replaces the two above
export DASK_CONFIG=${DASK_CONFIG:-$AI4LAND_MN5/jobqueue-acc.yaml}   # or jobqueue-acc-node.yaml, jobqueue-gpp.yaml
# Account and QoS are in the job files. These two, if set, replace them in all jobs; `bsc_project list` and `bsc_queues` show yours:
#   export SBATCH_ACCOUNT=ehpc999 SBATCH_QOS=acc_ehpc

# -- modules, Python ----------------------------------------------------------------------------------------------------
AI4LAND_IN=() # prefix of a command that runs inside the image
_ai4land_modules=$AI4LAND_MODULES
if [[ -n $AI4LAND_SIF ]]; then
    _ai4land_modules=singularity/4.1.5 # (?)
    AI4LAND_IN=(singularity exec --nv --bind "/gpfs,${TMPDIR:-/tmp}" "$AI4LAND_SIF")
fi
if [[ -n $_ai4land_modules ]] && command -v module >/dev/null; then
    _ai4land_options=$(set +o) # the module command fails under `set -eu`
    set +eu
    module purge
    # shellcheck disable=SC2086
    module load $_ai4land_modules
    eval "$_ai4land_options"
fi
unset PYTHONHOME PYTHONPATH
export PYTHONNOUSERSITE=1
if [[ -z $AI4LAND_SIF ]]; then
    [[ -x $AI4LAND_VENV/bin/python ]] || echo "env.sh: no Python in $AI4LAND_VENV; run install-offline.sh, or set AI4LAND_VENV" >&2
    export PATH=$AI4LAND_VENV/bin:${PATH//"$AI4LAND_VENV/bin:"/} # before the entries of the modules
fi

# -- processes ----------------------------------------------------------------------------------------------------------
export OMP_NUM_THREADS=1              # AI4Land sets the threads of its networks itself
export HDF5_USE_FILE_LOCKING=FALSE    # inputs on GPFS are only read, and its locks are slow
export SLURM_CPU_BIND=none            # a process may use all cores of its job
[[ -z ${SLURM_CPUS_PER_TASK-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun no longer inherits it from sbatch
if [[ -e /sys/class/net/ib0 ]]; then  # (?) the name of the InfiniBand interface; `ip -br a` on a node
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-ib0} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-ib0}
fi

# ai4land_until_done FILE COMMAND...: run a command in this job. When SLURM signals that the job is about to end (#SBATCH --signal), the
# command gets some time to end by itself. If it fails after that, or ends well without FILE, the job returns to the queue to resume
# (?: users may requeue), at most AI4LAND_TIMES times. If the command fails before the signal, the job fails.
ai4land_until_done() {
    local file=$1 ending=0 status=0 step watch
    shift
    trap 'ending=1' USR1
    "$@" &
    step=$!
    wait "$step" || status=$?
    if ((ending)); then
        (sleep "${AI4LAND_GRACE:-330}" && kill -TERM "$step") 2>/dev/null &
        watch=$!
        status=0
        wait "$step" || status=$?
        kill "$watch" 2>/dev/null || true
    fi
    if ((status == 0)) && [[ -e $file ]]; then
        return 0
    elif ((status && !ending)); then
        return "$status"
    fi
    if ((${SLURM_RESTART_COUNT:-0} >= ${AI4LAND_TIMES:-20})); then
        echo "$file does not exist after ${AI4LAND_TIMES:-20} returns to the queue; submit the job again to resume" >&2
        return 1
    fi
    echo "the job returns to the queue to resume: $file does not exist yet"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # SLURM ends this script
}

# ai4land_folder RUN.yaml [KEY=VALUE]...: print the folder of a run.
ai4land_folder() {
    "${AI4LAND_IN[@]}" python -c 'import sys; from ai4land.run.file import load_run; print(load_run(sys.argv[1], sys.argv[2:]).folder)' "$@"
}
