{{- define "imgsnap.labels" -}}
app.kubernetes.io/name: imgsnap
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "imgsnap.pod" -}}
# With the host's processes: the parts find each other by process ids, in records on disk.
hostPID: true
hostNetwork: true
priorityClassName: {{ .Values.priorityClassName }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
nodeSelector: {{ toJson .Values.nodeSelector }}
tolerations: {{ toJson .Values.tolerations }}
volumes:
  - name: run
    hostPath: { path: {{ .Values.runDir }}, type: DirectoryOrCreate }
  - name: state
    hostPath: { path: {{ .Values.stateDir }}, type: DirectoryOrCreate }
  - name: hosts
    hostPath: { path: {{ .Values.hostsDir }}, type: DirectoryOrCreate }
  - name: containerd
    hostPath: { path: {{ dir .Values.containerdSocket }}, type: Directory }
  - name: modules
    hostPath: { path: /lib/modules, type: "" }
{{- if .Values.registrySecret }}
  - name: registry
    secret:
      secretName: {{ .Values.registrySecret }}
      items: [{ key: .dockerconfigjson, path: config.json }]
{{- end }}
{{- end }}

{{- define "imgsnap.container" -}}
image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext: { privileged: true } # mounts, /dev/fuse
env:
  - { name: IMGSNAP_RUN_DIR, value: {{ .Values.runDir }} }
  - { name: IMGSNAP_CACHE_DIR, value: {{ .Values.stateDir }}/cache }
  - { name: IMGSNAP_STORE, value: {{ .Values.stateDir }}/store }
  - { name: IMGSNAP_HOSTS_DIR, value: {{ .Values.hostsDir }} }
  - { name: CONTAINERD_ADDRESS, value: {{ .Values.containerdSocket }} }
{{- with .Values.cacheQuota }}
  - { name: IMGSNAP_CACHE_QUOTA, value: {{ . | quote }} }
{{- end }}
{{- if .Values.registrySecret }}
  - { name: DOCKER_CONFIG, value: /etc/imgsnap/registry }
{{- end }}
volumeMounts:
  - { name: run, mountPath: {{ .Values.runDir }}, mountPropagation: Bidirectional }
  - { name: state, mountPath: {{ .Values.stateDir }}, mountPropagation: Bidirectional }
  - { name: hosts, mountPath: {{ .Values.hostsDir }}, readOnly: true }
  - { name: containerd, mountPath: {{ dir .Values.containerdSocket }} }
  - { name: modules, mountPath: /lib/modules, readOnly: true }
{{- if .Values.registrySecret }}
  - { name: registry, mountPath: /etc/imgsnap/registry, readOnly: true }
{{- end }}
{{- end }}
