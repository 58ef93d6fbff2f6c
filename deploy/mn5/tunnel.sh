#!/usr/bin/env bash
# Show a Dask dashboard of MareNostrum 5 in the browser of this computer.
#
#     tunnel.sh PORT USER@LOGIN [NODE]        e.g. tunnel.sh 8787 bsc032xxx@alogin1.bsc.es as03r1b14
#
# PORT is the one that the run printed ("Dask dashboard: http://127.0.0.1:PORT/status"). Without NODE, the run is on the login node. With NODE,
# it is in a job on that node (see squeue), and the tunnel goes through the login node. A dashboard listens on the loopback of its node only, so
# nobody else can reach it. PRINT=1 prints the command without running it.
set -euo pipefail
case $# in
    2) target=("$2") ;;
    3) target=(-J "$2" "${2%%@*}@$3") ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
[[ $1 =~ ^[0-9]+$ && $2 == *@* ]] || { echo "tunnel.sh: got $*, expected PORT USER@LOGIN [NODE], such as 8787 me@alogin1.bsc.es" >&2; exit 2; }
command=(ssh -N -L "$1:127.0.0.1:$1" -o ExitOnForwardFailure=yes -o ServerAliveInterval=60 "${target[@]}")
echo "${command[*]}"
[[ -z ${PRINT-} ]] || exit 0
echo "open http://127.0.0.1:$1/status; Ctrl-C ends the tunnel" >&2
exec "${command[@]}"
