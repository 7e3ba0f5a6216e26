//! What Culvert's controller tells of a workload beyond the common mesh API. A workload of another's has none of it, and the defaults.

use prost::Message;

use super::{At, DecodeError, Fault, quote};
use crate::model::{Mode, PeerAuthentication, PodUid, SameNode};
use crate::proto::{PEER_AUTHENTICATION_TYPE, POD_TYPE, SAME_NODE_TYPE, culvert, workload};

/// The name of the extension that carries a workload's modes.
const PEER_AUTHENTICATION_EXTENSION: &str = "peer_authentication";
/// The name of the extension that says how a workload speaks to pods of its node.
const SAME_NODE_EXTENSION: &str = "same_node";
/// The name of the extension that says which pod a workload of this node is.
const POD_EXTENSION: &str = "pod_uid";

impl At<'_> {
    /// What the workload's ports accept.
    pub(super) fn peer_authentication(&self, extensions: &[workload::Extension]) -> Result<PeerAuthentication, DecodeError> {
        let field = format!("extensions[{PEER_AUTHENTICATION_EXTENSION}]");
        let message = self.extension(extensions, PEER_AUTHENTICATION_EXTENSION, PEER_AUTHENTICATION_TYPE)?;
        let Some(message): Option<culvert::PeerAuthentication> = message else { return Ok(PeerAuthentication::default()) };
        let mode = |field: String, value: i32| {
            Ok(match self.value(field, value)? {
                culvert::peer_authentication::Mode::Permissive => Mode::Permissive,
                culvert::peer_authentication::Mode::Strict => Mode::Strict,
                culvert::peer_authentication::Mode::Disable => Mode::Disable,
            })
        };
        let ports = message.ports.iter().map(|(port, value)| {
            let field = format!("{field}.ports[{port}]");
            Ok((self.port(|| field.clone(), *port)?, mode(field.clone(), *value)?))
        });
        Ok(PeerAuthentication {
            mode: mode(format!("{field}.mode"), message.mode)?,
            ports: ports.collect::<Result<_, DecodeError>>()?,
        })
    }

    /// How the workload speaks to other pods of its node.
    pub(super) fn same_node(&self, extensions: &[workload::Extension]) -> Result<SameNode, DecodeError> {
        let message = self.extension(extensions, SAME_NODE_EXTENSION, SAME_NODE_TYPE)?;
        let Some(message): Option<culvert::SameNode> = message else { return Ok(SameNode::default()) };
        Ok(match self.value(format!("extensions[{SAME_NODE_EXTENSION}].way"), message.way)? {
            culvert::same_node::Way::Kernel => SameNode::Kernel,
            culvert::same_node::Way::Tunnel => SameNode::Tunnel,
        })
    }

    /// Which pod the workload is.
    pub(super) fn pod(&self, extensions: &[workload::Extension]) -> Result<Option<PodUid>, DecodeError> {
        let message = self.extension(extensions, POD_EXTENSION, POD_TYPE)?;
        let Some(message): Option<culvert::Pod> = message else { return Ok(None) };
        match &*message.uid {
            "" => Err(self.fault(format!("extensions[{POD_EXTENSION}].uid"), Fault::Missing)),
            uid => Ok(Some(uid.into())),
        }
    }

    /// The message of this type that the extension of this name holds; none when there is no such extension.
    fn extension<M: Message + Default>(
        &self,
        extensions: &[workload::Extension],
        name: &str,
        type_url: &str,
    ) -> Result<Option<M>, DecodeError> {
        let field = format!("extensions[{name}]");
        let Some(extension) = extensions.iter().find(|extension| extension.name == name) else { return Ok(None) };
        let config = extension.config.as_ref().ok_or_else(|| self.fault(&*field, Fault::Missing))?;
        if config.type_url != type_url {
            let fault = Fault::Type { is: quote(&config.type_url), expected: type_url.to_owned() };
            return Err(self.fault(format!("{field}.type_url"), fault));
        }
        M::decode(&*config.value).map(Some).map_err(|error| self.fault(field, Fault::Proto(error.to_string())))
    }
}
