//! One YAML document as JSON: keys that are numbers or booleans become text, as Kubernetes' tools do it.
//!
//! Enters: a document's deserializer. Leaves: a value, merges (`<<`) applied. What references unfold to is bounded: a file of a
//! megabyte can stand for a terabyte.

use std::cell::Cell;
use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, EnumAccess, Error, MapAccess, SeqAccess, Unexpected, Visitor};
use serde_json::{Map, Number, Value};

/// How much a document may unfold to, in bytes of texts and of what holds them.
const BUDGET: usize = 128 * 1024 * 1024;
/// What a value costs besides its text, in bytes.
const VALUE: usize = 32;
/// The key whose value is merged into the mapping.
const MERGE: &str = "<<";

/// Reads a document.
pub(super) fn read<'de, D: Deserializer<'de>>(document: D) -> Result<Value, D::Error> {
    let left = Cell::new(BUDGET);
    Node { left: &left }.deserialize(document)
}

#[derive(Clone, Copy)]
struct Node<'a> {
    left: &'a Cell<usize>,
}

impl Node<'_> {
    fn spend<E: Error>(self, bytes: usize) -> Result<(), E> {
        let left = self.left.get().checked_sub(VALUE + bytes);
        let left = left.ok_or_else(|| E::custom(format!("its references (`*name`) unfold to more than {BUDGET} bytes")))?;
        self.left.set(left);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, source: D) -> Result<Value, D::Error> {
        source.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value that JSON has, too")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        self.spend(0).map(|()| Value::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        self.spend(0).map(|()| value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        self.spend(0).map(|()| value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        self.spend(0)?;
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("`.nan` and `.inf` have no meaning in an object"))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        self.spend(text.len()).map(|()| text.into())
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        self.spend(0).map(|()| Value::Null)
    }

    fn visit_none<E: Error>(self) -> Result<Value, E> {
        self.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, source: D) -> Result<Value, D::Error> {
        self.deserialize(source)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        self.spend(0)?;
        let mut all = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            all.push(item);
        }
        Ok(Value::Array(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        self.spend(0)?;
        let mut object = Map::new();
        while let Some(key) = entries.next_key_seed(self)? {
            let key = match key {
                Value::String(key) => key,
                key @ (Value::Number(_) | Value::Bool(_)) => key.to_string(),
                Value::Null | Value::Array(_) | Value::Object(_) => {
                    return Err(A::Error::custom("a key is neither a text nor a number"));
                }
            };
            if object.contains_key(&key) {
                return Err(A::Error::custom(format!("the key `{key}` occurs twice in one mapping")));
            }
            object.insert(key, entries.next_value_seed(self)?);
        }
        merged(object).map(Value::Object)
    }

    fn visit_enum<A: EnumAccess<'de>>(self, _tagged: A) -> Result<Value, A::Error> {
        Err(A::Error::custom("YAML tags (`!...`) have no meaning in an object"))
    }
}

/// The mapping with what its `<<` names; its own keys win, and of several mappings the first.
fn merged<E: Error>(mut object: Map<String, Value>) -> Result<Map<String, Value>, E> {
    let sources = match object.remove(MERGE) {
        None => return Ok(object),
        Some(Value::Array(sources)) => sources,
        Some(source) => vec![source],
    };
    for source in sources {
        let Value::Object(source) = source else {
            return Err(E::invalid_type(Unexpected::Other("something else"), &"a mapping to merge with `<<`"));
        };
        for (key, value) in source {
            object.entry(key).or_insert(value);
        }
    }
    Ok(object)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn value(text: &str) -> Result<Value, String> {
        read(serde_yaml_ng::Deserializer::from_str(text)).map_err(|error| error.to_string())
    }

    #[test]
    fn yaml_is_read_as_json() {
        for (text, expected) in [
            ("~", json!(null)),
            ("", json!(null)),
            ("{1: a, true: b, c: [1, -2, 1.5, no, 'x']}", json!({"1": "a", "true": "b", "c": [1, -2, 1.5, "no", "x"]})),
            ("18446744073709551615", json!(u64::MAX)),
            ("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", json!({"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}})),
            ("b: {<<: [{x: 1}, {x: 2, y: 2}]}", json!({"b": {"x": 1, "y": 2}})),
            ("a: &a [1]\nb: *a", json!({"a": [1], "b": [1]})),
        ] {
            assert_eq!(value(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_json_does_not_have_is_refused() {
        for (text, part) in [
            ("{a: 1, a: 2}", "`a` occurs twice"),
            ("{? [1] : 2}", "neither a text nor a number"),
            ("{~: 2}", "neither a text nor a number"),
            (".nan", ".inf"),
            ("!x {}", "tags"),
            ("{<<: 1}", "merge"),
        ] {
            let message = value(text).expect_err(text);
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn references_unfold_to_so_much_and_no_more() {
        let text = format!("a: &a '{}'\nb: [{}]\n", "x".repeat(1 << 20), "*a, ".repeat(1000));
        let message = value(&text).expect_err("a gibibyte");
        assert!(message.contains("unfold to more than"), "{message}");
        let nested = "[".repeat(10_000);
        assert!(value(&nested).is_err());
    }
}
