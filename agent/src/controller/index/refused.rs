//! Objects that cannot be used as they are now.
//!
//! Enters: such an object's key, what is wrong with it, and for a policy what stands in for it. Leaves: what is in force instead, in words:
//! what the object said before, if it ever made sense; else what stands in for it, so that a policy closes what it may have closed.

use super::Index;
use super::findings::Force;
use crate::controller::source::stand_in::effect_of;
use crate::controller::source::{FieldError, Object, ObjectKey};

impl Index {
    /// Refuses an object. Gives a message on it.
    pub(super) fn refuse(
        &mut self,
        key: &ObjectKey,
        uid: Option<&String>,
        error: &FieldError,
        stand_in: Option<&Object>,
    ) -> String {
        let before = self.findings.force(key);
        let (force, effect) = match stand_in {
            _ if before == Force::Object => (before, "what the object said before stays in force".to_owned()),
            Some(stand_in) => {
                // It was checked, and nothing is to be said of it but its effect.
                self.apply_object(stand_in, "a stand-in", &mut Vec::new());
                (Force::StandIn, format!("until it is put right, {}", effect_of(stand_in)))
            }
            None => {
                if before == Force::StandIn {
                    self.remove_object(key);
                }
                (Force::Nothing, "nothing of the object is in force".to_owned())
            }
        };
        self.findings.refuse(key, uid, format!("{error}; {effect}"), force);
        format!("{key}: {error}; {effect}")
    }
}
