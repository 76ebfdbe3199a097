#!/usr/bin/env bash
# When: on one or several hosts with Open MPI and no cluster manager; from one of them you reach the others by ssh.
# Run:  launch/mpi.sh HOSTFILE train.py --ds_config ds_configs/muon_zero2.json    (HOSTFILE: see launch/hostfile.example)
# Needs pip install 'ds-optforge[mpi]', and the same paths on every host. ssh may not ask questions: use keys.
set -euo pipefail

fail() {
    echo "mpi.sh: error: $1" >&2
    exit 2
}
(($# >= 2)) || fail "needed: a hostfile, a script and its arguments; got: '$*'"
hostfile=$1
shift
[[ -f $hostfile && -r $hostfile ]] || fail "hostfile '$hostfile' is not a file that can be read"
command -v mpirun > /dev/null || fail "mpirun is not on the path; run: pip install 'ds-optforge[mpi]'"

# Left alone, ssh asks for passwords and waits more than two minutes for a host that does not answer.
export PRTE_MCA_plm_ssh_agent=${PRTE_MCA_plm_ssh_agent:-ssh -o BatchMode=yes -o ConnectTimeout=10}

# mpirun hands the other hosts no environment but what -x names.
exports=()
while read -r name; do
    case $name in
    PATH | PYTHONPATH | LD_LIBRARY_PATH | MASTER_PORT) exports+=(-x "$name") ;;
    CUDA_* | DS_* | GLOO_* | NCCL_* | OMP_NUM_THREADS | TORCH_*) exports+=(-x "$name") ;;
    esac
done < <(compgen -e)

# As many ranks as the hostfile has slots. A rank brings threads of its own: bound to one core, they would share it.
exec mpirun --hostfile "$hostfile" --bind-to none "${exports[@]}" python "$@"
