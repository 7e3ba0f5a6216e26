//! All the ways in which a program can end. Each is counted, in the per-CPU array `OUTCOMES`.

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Outcome {
    /// `connect`: captured.
    Captured = 0,
    /// `connect`: a destination outside the mesh, or one that takes no tunnels.
    PassedOutside = 1,
    /// `connect`: loopback or the pod's own address.
    PassedLocal = 2,
    /// `connect`: the agent's own.
    PassedAgent = 3,
    /// `connect`: refused, the namespace is not classified yet.
    RefusedPending = 4,
    /// `connect`: refused, the agent has never seen the namespace.
    RefusedUnseen = 5,
    /// `connect`: refused, the service has no ready endpoint on that port.
    RefusedNoEndpoint = 6,
    /// `connect`: refused, the pod has no address of the destination's family, or a map is full.
    RefusedNoRoom = 7,
    /// `sk_lookup`: the agent's own delivery.
    AdmittedDelivery = 8,
    /// `sk_lookup`: plaintext that the mode and the policy let through.
    AdmittedPlaintext = 9,
    /// `sk_lookup`: plaintext that the agent decides.
    SteeredPlaintext = 10,
    /// `sk_lookup`: a peer's tunnel.
    SteeredTunnel = 11,
    /// `sk_lookup`: a captured connection on its way to the agent.
    SteeredCaptured = 12,
    /// `sk_lookup`: plaintext refused.
    DroppedPlaintext = 13,
    /// `sk_lookup`: the agent's listener is gone.
    DroppedNoListener = 14,
    /// `sk_lookup`: loopback, or the pod to itself.
    AdmittedLocal = 15,
    /// `sk_lookup`: the kubelet's own connection.
    AdmittedProbe = 16,
    /// `connect`: straight to another pod of the node, by the agent's verdict.
    PassedSameNode = 17,
    /// `sk_lookup`: from another pod of the node, as its connect program attested.
    AdmittedSameNode = 18,
    /// `sk_lookup`: the same, but the destination has changed meanwhile: the agent decides.
    SteeredSameNode = 19,
    /// `sock_ops`: a connection to another pod of the node was not attested: its source is not the pod's own address, or a map is
    /// full.
    UnattestedSameNode = 20,
    /// `sock_ops`: no room to tell the agent of a connection at once. Its end is told later.
    DelayedTelling = 21,
}

impl Outcome {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 22] = [
        Self::Captured,
        Self::PassedOutside,
        Self::PassedLocal,
        Self::PassedAgent,
        Self::RefusedPending,
        Self::RefusedUnseen,
        Self::RefusedNoEndpoint,
        Self::RefusedNoRoom,
        Self::AdmittedDelivery,
        Self::AdmittedPlaintext,
        Self::SteeredPlaintext,
        Self::SteeredTunnel,
        Self::SteeredCaptured,
        Self::DroppedPlaintext,
        Self::DroppedNoListener,
        Self::AdmittedLocal,
        Self::AdmittedProbe,
        Self::PassedSameNode,
        Self::AdmittedSameNode,
        Self::SteeredSameNode,
        Self::UnattestedSameNode,
        Self::DelayedTelling,
    ];

    /// The word for a metric's label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Captured => "captured",
            Self::PassedOutside => "passed_outside",
            Self::PassedLocal => "passed_local",
            Self::PassedAgent => "passed_agent",
            Self::RefusedPending => "refused_pending",
            Self::RefusedUnseen => "refused_unseen",
            Self::RefusedNoEndpoint => "refused_no_endpoint",
            Self::RefusedNoRoom => "refused_no_room",
            Self::AdmittedDelivery => "admitted_delivery",
            Self::AdmittedPlaintext => "admitted_plaintext",
            Self::SteeredPlaintext => "steered_plaintext",
            Self::SteeredTunnel => "steered_tunnel",
            Self::SteeredCaptured => "steered_captured",
            Self::DroppedPlaintext => "dropped_plaintext",
            Self::DroppedNoListener => "dropped_no_listener",
            Self::AdmittedLocal => "admitted_local",
            Self::AdmittedProbe => "admitted_probe",
            Self::PassedSameNode => "passed_same_node",
            Self::AdmittedSameNode => "admitted_same_node",
            Self::SteeredSameNode => "steered_same_node",
            Self::UnattestedSameNode => "unattested_same_node",
            Self::DelayedTelling => "delayed_telling",
        }
    }
}
