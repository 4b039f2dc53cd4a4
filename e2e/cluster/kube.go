package main

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/procfs"
	corev1 "k8s.io/api/core/v1"
)

// kubectl returns what kubectl says, to stdout and stderr, in the proxy's namespace. It must succeed.
func (t *test) kubectl(args ...string) string {
	said, err := t.kubectlCommand(args...).CombinedOutput()
	if err != nil {
		t.fatalf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(said)))
	}
	return string(said)
}

func (t *test) kubectlCommand(args ...string) *exec.Cmd {
	return exec.CommandContext(t.ctx, "kubectl", append([]string{"--namespace", name}, args...)...)
}

// get is `kubectl get`.
func get[T any](t *test, args ...string) (object T) {
	t.check(json.Unmarshal([]byte(t.kubectl(append([]string{"get", "-o", "json"}, args...)...)), &object))
	return object
}

// pod is a pod as the cluster knows it.
type pod struct{ corev1.Pod }

// containers are those of every pod.
var containers = []string{"proxy", "tailscaled"}

func (p *pod) container(container string) corev1.ContainerStatus {
	for _, s := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if s.Name == container {
			return s
		}
	}
	return corev1.ContainerStatus{}
}

func (p *pod) ready() bool {
	return p.DeletionTimestamp == nil && slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

func (p *pod) String() string {
	return fmt.Sprintf("%s: proxy %+v, tailscaled %+v", p.Name, p.container("proxy").State, p.container("tailscaled").State)
}

// own is the way to the proxy's own endpoints, as probes and scrapes take it.
func (p *pod) own() string { return "http://" + p.Status.PodIP + ":8081" }

// pods returns the Deployment's pods, those that end included.
func (t *test) pods() []*pod {
	return get[struct{ Items []*pod }](t, "pods", "-l", "app.kubernetes.io/name="+name).Items
}

// which is a way to find a pod.
type which func(*test) *pod

// theOnly is the only pod that is not ending.
func theOnly(t *test) *pod {
	alive := slices.DeleteFunc(t.pods(), func(p *pod) bool { return p.DeletionTimestamp != nil })
	if len(alive) != 1 {
		t.fatalf("the Deployment has %d pods, not one", len(alive))
	}
	return alive[0]
}

// named is the pod of that name.
func named(podName string) which {
	return func(t *test) *pod { return get[*pod](t, "pod", podName) }
}

// awaitPod polls a pod until ok is true of it.
func (t *test) awaitPod(which which, what string, ok func(*pod) bool) (p *pod) {
	t.await(what, func(t *test) {
		if p = which(t); !ok(p) {
			t.fatalf("%v", p)
		}
	})
	return p
}

// awaitGone returns when none of these pods is left.
func (t *test) awaitGone(old ...*pod) {
	for _, p := range old {
		t.kubectl("wait", "--for=delete", "pod/"+p.Name, "--timeout=120s")
	}
}

func (t *test) awaitReady() *pod { return t.awaitPod(theOnly, "a Ready pod", (*pod).ready) }

// wantRestarts holds that it is the same pod still, of which these containers have been restarted and no other.
func (t *test) wantRestarts(before, after *pod, want ...string) {
	if after.UID != before.UID {
		t.fatalf("the pod was replaced")
	}
	for _, c := range containers {
		was, now := before.container(c), after.container(c)
		if restarted := now.RestartCount > was.RestartCount; restarted != slices.Contains(want, c) {
			t.fatalf("%s: %d restarts, then %d: %+v", c, was.RestartCount, now.RestartCount, now.LastTerminationState.Terminated)
		}
	}
}

// exitCode is -1 while a container has not ended.
func exitCode(s corev1.ContainerState) int {
	if s.Terminated == nil {
		return -1
	}
	return int(s.Terminated.ExitCode)
}

// awaitLog polls until the container's log since its last start holds all texts in one line.
func (t *test) awaitLog(p *pod, container string, texts ...string) (line string) {
	t.await("a line in the log of "+container, func(t *test) { line = t.find(t.kubectl("logs", p.Name, "-c", container), texts...) })
	return line
}

// find returns the first line that holds all texts. There must be one.
func (t *test) find(log string, texts ...string) string {
	line := findLine(log, texts...)
	if line == "" {
		lines := strings.Split(strings.TrimSpace(log), "\n")
		t.fatalf("no line has %q; the last are:\n%s", texts, strings.Join(lines[max(0, len(lines)-10):], "\n"))
	}
	return line
}

// findLine returns the first line that holds all texts, "" if there is none.
func findLine(log string, texts ...string) string {
	for line := range strings.Lines(log) {
		if !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(line, text) }) {
			return strings.TrimSpace(line)
		}
	}
	return ""
}

// process finds the process of that program in a container, in this machine's /proc.
func (t *test) process(p *pod, container, program string) procfs.Proc {
	_, id, _ := strings.Cut(p.container(container).ContainerID, "://")
	if id == "" {
		t.fatalf("%s has no container", container)
	}
	for _, process := range must(procfs.AllProcs())(t) {
		groups, _ := process.Cgroups() // it may have ended
		path, _ := process.Executable()
		inside := slices.ContainsFunc(groups, func(c procfs.Cgroup) bool { return strings.Contains(c.Path, id) })
		if inside && filepath.Base(path) == program {
			return process
		}
	}
	t.fatalf("no process %s of container %s in /proc: this program has to run on the pod's node", program, id)
	panic("unreachable")
}

// end ends a program in a pod's container and waits until that container, and no other, has been restarted and the pod is Ready.
func (t *test) end(which which, container, program string, sig syscall.Signal) (start time.Time) {
	before := t.awaitPod(which, "a Ready pod", (*pod).ready)
	which = named(before.Name)
	process := t.process(before, container, program)
	start = time.Now()
	t.check(syscall.Kill(process.PID, sig))
	after := t.awaitPod(which, "the restart of "+container, func(p *pod) bool {
		return p.container(container).RestartCount > before.container(container).RestartCount && p.ready()
	})
	t.wantRestarts(before, after, container)
	return start
}
