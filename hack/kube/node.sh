#!/bin/bash
# Copyright The csi-disktemplate Authors.
# SPDX-License-Identifier: Apache-2.0

# The node: process 1 of its namespaces, started by `cluster`. It starts every
# program, and starts it again when it ends, as systemd would.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
kubeconfig=$STATE/kubeconfig
logs=$STATE/logs
mkdir -p "$STATE"/{certs,cni,etcd,logs,pids,pod-logs,sysctl,volume-plugins}

# keep NAME CMD … runs a command, and runs it again whenever it ends. Its pid is in pids/NAME.
keep() {
	local name=$1
	shift
	while :; do
		"$@" >>"$logs/$name.log" 2>&1 &
		echo $! >"$STATE/pids/$name"
		wait $! || true
		sleep 1
	done &
}

# Kubelet's directory is on a disk of its own. The machine's own disk may be nearly full, and of a disk that is kubelet's
# too the plugin would leave a fifth free (--node-headroom).
kubelet=$STATE/root/var/lib/kubelet
if [[ ! -e $STATE/kubelet.img ]]; then
	truncate --size 16G "$STATE/kubelet.img"
	mkfs.ext4 -q "$STATE/kubelet.img"
fi

# Mounts here are not seen outside. The node has its own copies of the directories
# that kubelet and containerd write to.
hostname "$NODE"
mount --make-rprivate /
mount -t proc proc /proc
# A copy of a test's mount would keep its filesystem and its loop device as long as the node lives.
cut -d' ' -f5 /proc/self/mountinfo | while read -r at; do
	case $at in
	"$STATE" | "$STATE"/*) ;;
	/var/tmp/*) umount --lazy "$at" 2>/dev/null || true ;; # gone with one that was above it
	esac
done
mount --make-rshared /
mkdir -p "$kubelet"
mount -o loop "$STATE/kubelet.img" "$kubelet"
for dir in /etc/cni /opt/cni /run/containerd /var/lib/cni /var/lib/csi-disktemplate /var/lib/csi-disktemplate-contents \
	/var/lib/kubelet /var/log/containers /var/log/pods; do
	mkdir -p "$dir" "$STATE/root$dir"
	mount --bind "$STATE/root$dir" "$dir"
	mount --make-rshared "$dir"
done

# Network: the loopback interface and a veth pair, because kubelet does not accept a
# loopback address as the node's. No DNS query leaves the node. There is no kube-proxy:
# the address of the service `kubernetes` is the node's own, and the API server listens
# on the service's port.
service=172.31.253.1 address=172.31.255.1
ip link set lo up
ip address add "$service/32" dev lo
ip link add veth0 type veth peer name veth1
ip address add "$address/24" dev veth0
ip link set veth0 up
ip link set veth1 up
ip route add default dev veth0
: >"$STATE/resolv.conf"
printf '127.0.0.1 localhost\n%s %s\n' "$address" "$NODE" >"$STATE/hosts"
mount --bind "$STATE/resolv.conf" /etc/resolv.conf
mount --bind "$STATE/hosts" /etc/hosts
cat >"$STATE/cni/10-bridge.conflist" <<J
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "172.31.254.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}], "dataDir": "/var/lib/cni/networks"}},
  {"type": "loopback"}]}
J
rm -rf /var/lib/cni/networks # after a reboot no pod has its address any more

# kubelet insists on these sysctls, which belong to the whole machine. It gets files
# that hold the values already.
while read -r name value; do
	file=$STATE/sysctl/${name//\//_}
	echo "$value" >"$file"
	mount --bind "$file" "/proc/sys/$name"
done <<'T'
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
T

for controller in cpu cpuacct cpuset memory pids devices freezer blkio systemd; do
	mkdir -p "/sys/fs/cgroup/$controller/$CGROUP"
done
for file in cpuset.cpus cpuset.mems; do
	cat "/sys/fs/cgroup/cpuset/$file" >"/sys/fs/cgroup/cpuset/$CGROUP/$file"
done

sed "s|@STATE@|$STATE|g; s|@CGROUP@|$CGROUP|g" "$here/containerd.toml" >"$STATE/containerd.toml"
sed "s|@STATE@|$STATE|g; s|@CGROUP@|$CGROUP|g" "$here/kubelet.yaml" >"$STATE/kubelet.yaml"
[[ -e $STATE/certs/sa.key ]] || openssl genrsa -out "$STATE/certs/sa.key" 2048 2>/dev/null
echo 'of-this-cluster-only,admin,1,system:masters' >"$STATE/tokens.csv"
cat >"$kubeconfig" <<J
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:443", insecure-skip-tls-verify: true}}]
users: [{name: u, user: {token: of-this-cluster-only}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
J

# The tests do in minutes what a node does in days, so no client may be throttled.
export GOGC=400 # takes more memory and less processor time
fast=(--kube-api-qps 300 --kube-api-burst 600)
keep containerd containerd --config "$STATE/containerd.toml"
keep etcd "$STATE/bin/etcd" --name n --data-dir "$STATE/etcd" --unsafe-no-fsync \
	--listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
	--listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 --initial-cluster n=http://127.0.0.1:2380
keep apiserver "$STATE/bin/kube-apiserver" --etcd-servers http://127.0.0.1:2379 --bind-address 0.0.0.0 --secure-port 443 \
	--advertise-address "$address" --endpoint-reconciler-type none --kubelet-preferred-address-types InternalIP \
	--cert-dir "$STATE/certs" --service-cluster-ip-range 172.31.253.0/24 --allow-privileged=true \
	--token-auth-file "$STATE/tokens.csv" --authorization-mode Node,RBAC \
	--audit-policy-file "$here/audit.yaml" --audit-log-path "$logs/audit.log" \
	--service-account-key-file "$STATE/certs/sa.key" --service-account-signing-key-file "$STATE/certs/sa.key" \
	--service-account-issuer https://kubernetes.default.svc --profiling=false --v=1
until "$STATE/bin/kubectl" --kubeconfig "$kubeconfig" get --raw /readyz >/dev/null 2>&1; do sleep 0.2; done
keep controller-manager "$STATE/bin/kube-controller-manager" --kubeconfig "$kubeconfig" --leader-elect=false --bind-address 127.0.0.1 \
	--service-account-private-key-file "$STATE/certs/sa.key" --root-ca-file "$STATE/certs/apiserver.crt" \
	--use-service-account-credentials=false --attach-detach-reconcile-sync-period 5s --pvclaimbinder-sync-period 5s --profiling=false --v=1 "${fast[@]}"
keep scheduler "$STATE/bin/kube-scheduler" --kubeconfig "$kubeconfig" --leader-elect=false --bind-address 127.0.0.1 --profiling=false --v=1 "${fast[@]}"
keep snapshot-controller "$STATE/bin/snapshot-controller" --kubeconfig "$kubeconfig" --enable-distributed-snapshotting --kube-api-qps 100 --kube-api-burst 200 --v=2
until ctr --address "$STATE/containerd.sock" version >/dev/null 2>&1; do sleep 0.2; done
keep kubelet "$STATE/bin/kubelet" --kubeconfig "$kubeconfig" --config "$STATE/kubelet.yaml" --root-dir /var/lib/kubelet \
	--cert-dir "$STATE/certs/kubelet" --hostname-override "$NODE" --node-ip "$address" --v=2
until "$STATE/bin/kubectl" --kubeconfig "$kubeconfig" get node "$NODE" >/dev/null 2>&1; do sleep 0.2; done
touch "$STATE/started"
wait
